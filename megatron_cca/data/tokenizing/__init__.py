"""Turn captioned images into a shard folder, in parts, on any number of processes. An interrupted job can go on."""
