"""The messages of the wire protocol, a file for each kind of link.

Each link joins a ROUTER or DEALER that binds and DEALERs that connect. These messages go over it:

    control   node -> coordinator            Hello Ready Refused NodeBeat Leaving
              coordinator -> node            Assign Trust Wire Share Cancel Beat Stop
    data      coordinator, node -> node      Fragment                  inputs of a stage
              node -> coordinator            Fragment Started Failed   outputs, and what became of a request
              node -> node, coordinator      Receipt                   load, for a peer on another host
    files     node -> coordinator            Fetch                     from nodes that do not see the plan's folder
              coordinator -> node            Chunk NoFile
    measure   any process -> agent           Ping Trust MeasureLink FilePiece MeasureModel
              agent -> that process          Pong LinkFigures FileStored ModelTime CannotMeasure

A message is one or more ZeroMQ frames:

    frame 0    header: MessagePack, an array that begins with the message's tag; unknown tags and fields are refused
    frame 1..  bytes: of a Fragment, one frame for each tensor that lies neither in the header nor in shared memory;
               of a Chunk, a FilePiece or a Ping, one frame at most

Order of messages between the coordinator and one node:

    coordinator                         node
         | <------------------- Hello     |  first message: its process, its addresses, the stage it wants
         | Trust ---------------------->  |  public keys of all nodes; again whenever they change
         | Assign --------------------->  |  its stage, which it loads
         | <----------------- [Refused]   |  it cannot load the stage, and exits
         | Wire ----------------------->  |  all processes; again whenever one comes, leaves or is lost
         | <------------------- Ready     |  reply to each Wire: whose memory it has mapped
         | Share ---------------------->  |  the peers that have mapped its memory
         | Fragment ===================>  |  (data link) inputs of a request
         | <=================== Fragment  |  (data link) outputs of a request
         | Cancel --------------------->  |  an attempt was given up
         | Beat ----------------------->  |  at regular intervals, in both directions
         | <------------------- NodeBeat  |
         | <------------------- Leaving   |  it received SIGTERM and finishes its work
         | Stop ----------------------->  |  exit, or rejoin
"""
