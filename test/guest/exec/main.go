package main

import (
	"errors"
	"fmt"
	"os"
)

// verbs are what the program can do, by its first argument.
var verbs = []struct {
	name, usage string
	args        int
	run         func(args []string) error
}{
	{"serve", "", 0, serve},
	{"vsock", "PORT: stdin to the host's PORT, its answer to stdout", 1, vsockPipe},
	{"vsock-flood", "PORT CONNECTIONS SECONDS: open, write rubbish, never read", 3, vsockFlood},
	{"vsock-listen", "PORT: accept and send stdin to each, for ever", 1, vsockListen},
	{"vsock-liar", "PORT FILE: answer health with stdin, else with FILE, or slowly and for ever where it is -", 2, vsockLiar},
	{"vsock-storm", "PORT ATTEMPTS: connect and hang up so often; tell how many were let in", 2, vsockStorm},
	{"swap", "DIR ENTRY TARGET COUNT: swap directory DIR/ENTRY with a symlink to TARGET", 4, swap},
	{"read-loop", "FILE: read it again and again past the cache; exit 5 at the first error", 1, readLoop},
	{"write-loop", "FILE: write and sync it again and again; exit 5 at the first error", 1, writeLoop},
	{"setcap", "FILE: give it a file capability", 1, setcap},
}

func main() {
	if len(os.Args) > 1 {
		for _, v := range verbs {
			if v.name == os.Args[1] && len(os.Args)-2 == v.args {
				exit(v.run(os.Args[2:]))
			}
		}
	}
	for _, v := range verbs {
		fmt.Fprintf(os.Stderr, "spectrum-test-exec %s %s\n", v.name, v.usage)
	}
	os.Exit(2)
}

// errIO is the end of a loop whose file went away, which is what its test
// waits for.
var errIO = errors.New("input/output ended")

func exit(err error) {
	if err == nil {
		os.Exit(0)
	}
	fmt.Fprintln(os.Stderr, "spectrum-test-exec:", err)
	if errors.Is(err, errIO) {
		os.Exit(5)
	}
	os.Exit(1)
}
