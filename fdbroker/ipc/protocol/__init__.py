"""What is said between client and broker: the tables of messages and their codec.  No sockets."""
