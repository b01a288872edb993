"""Value nodes: what stands where an activation stood, its energy, and where nodes are put."""
