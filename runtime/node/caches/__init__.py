"""The states of a stage: where they lie between two steps, and how a step reads and writes them.

States that lie and change together form a *bank*. All states of a bank have one kind; those of a pool have one shape.

    kind                       layout of rows       bank
    in-place                   any                  in_place: a pool of slots; a run reads and writes it where it lies
    append                     holes                holes: a pool of slots; new positions are copied to their rows
    append                     left, equal, one     packed: what a run made is what the next run reads
    recurrent, window          any                  packed, with the states before the last step as a spare
"""
