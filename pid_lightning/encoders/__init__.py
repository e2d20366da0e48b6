"""Pictures and captions to what PiD is conditioned on."""
