"""The wire protocol: messages, their encoding, sockets, links and keys."""
