"""Turn captioned images into token shards for training: ``python -m megatron_cca tokenize``."""

from megatron_cca.programs.tokenize import main

if __name__ == "__main__":
    main()
