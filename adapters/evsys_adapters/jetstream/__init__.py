"""Journals over JetStream: the connection, the messages, and the mirror that writes them to a journal again."""
