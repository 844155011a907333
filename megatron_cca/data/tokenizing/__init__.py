"""From captioned images to a shard folder: in parts, on any number of processes, going on where it was interrupted."""
