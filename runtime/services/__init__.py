"""Services: a user's Python code around models, in worker processes behind the gateway.

    client --HTTP--> gateway --socket--> worker: an object of the user's class
                        ^                   |
                        '--- asks models ---'     the models run in the gateway's pipelines

:mod:`~runtime.services.declare` is what users import. The other modules run in the worker, and describe a service to
the gateway, which imports no code of users.
"""
