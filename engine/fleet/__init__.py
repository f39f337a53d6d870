"""Where trials run: devices, worker processes, pools on machines and clusters, and being told to stop."""
