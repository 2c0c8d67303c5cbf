"""Published name of `lorascope collect`, where several GPUs were meant."""

from lorascope.cli import call_stage

if __name__ == "__main__":
    call_stage("collect")
