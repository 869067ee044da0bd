"""Online applications on Ray Serve; they come with the serving issue."""
