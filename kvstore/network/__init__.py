"""Channels to our own servers, and the addresses that they listen on."""
