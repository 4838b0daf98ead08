"""The gateway: the HTTP and gRPC servers in front of pipelines, with metrics and a page. Needs the extra ``serve``.

    http.connections > http.bodies > http.inference -.
    (uvicorn)                        (http.codec)     > service > version > batcher > runtime.pipeline > nodes
                           grpc.servicer (grpc.codec)-'      `- shared_memory       (queue)

One event loop serves both protocols. Work that takes long runs in a few threads beside it (``threads``). The protocol,
the codecs and the queue are pure.
"""
