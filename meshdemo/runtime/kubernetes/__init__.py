"""The kubernetes runtime: the same mesh on any cluster, or on a kind cluster that meshdemo makes itself."""
