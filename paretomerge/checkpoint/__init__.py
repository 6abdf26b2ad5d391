"""How weights lie on disk: reading, writing, and what a tensor's name says about its place in the network."""
