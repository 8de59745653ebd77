"""`python -m hf_distill.cli`, the same as `hf-distill`."""

from hf_distill.cli.commands import main

if __name__ == "__main__":
    main()
