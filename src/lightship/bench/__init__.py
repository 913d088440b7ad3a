"""A load generator for any OpenAI-compatible server, open and closed loop; on raw sockets, so that it costs little."""
