"""The network front of pipelines: HTTP, gRPC, metrics and a page, as clients of Triton and KServe know them.

    client -> web (uvicorn, Starlette) -> http_codec --.                  .-> line -> pipeline -> nodes
    client -> rpc (grpc.aio)           -> grpc_codec --+-> service -> batcher
                                                       `<- regions (system shared memory)

One event loop serves both; what decides (protocol, codecs, line, describe) is pure. Needs the extra ``serve``.
"""
