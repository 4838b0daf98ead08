"""What is said on the wire.

Four links, each a ROUTER or DEALER that binds and DEALERs that connect; each message a header and then, for fragments,
a frame for every tensor that is neither in the header nor in shared memory:

    control   node DEALER -> coordinator ROUTER    Hello Ready Refused NodeBeat Leaving    rarely, and twice a second
              coordinator -> node                  Assign Trust Wire Share Cancel Beat Stop
    data      coordinator, node -> node DEALER     Fragment [tensor ...]                   inputs of a stage
              node -> node, coordinator DEALER     Receipt                                 between hosts, for balancing
              node -> coordinator DEALER           Fragment [tensor ...] Started Failed
    files     node DEALER -> coordinator ROUTER    Fetch                                   where the plan is not at hand
              coordinator -> node                  Chunk bytes | NoFile
    measure   any DEALER -> agent ROUTER           Ping [bytes] Trust MeasureLink Put bytes MeasureModel
              agent -> who asked                   Pong LinkFigures Taken ModelTime | Cannot

Headers are MessagePack with a tag; unknown fields and tags are refused.
"""
