"""What sparse kernels would gain on this machine, layer by layer, without a server."""
