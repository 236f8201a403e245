"""What happens between two rounds: clients' messages in, the server's next state out."""
