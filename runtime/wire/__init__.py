"""What crosses between processes: messages, frames, sockets and keys."""
