"""Published name of `lorascope collect`, which uses all GPUs that there are."""

from lorascope.cli import call_stage

if __name__ == "__main__":
    call_stage("collect")
