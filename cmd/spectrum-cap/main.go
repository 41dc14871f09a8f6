// Command spectrum-cap is the person's command line of the broker.
package main

//go:generate go run . reference ../../docs/reference/spectrum-cap.md

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"spectrum-os.org/broker/cmd/spectrum-cap/internal/cli"
	"spectrum-os.org/broker/policy"
)

func main() {
	// "policy check" and "policy test" have policies compiled and evaluated in a
	// sandboxed process of this binary.
	if len(os.Args) > 1 && os.Args[1] == "policy-worker" {
		os.Exit(policy.WorkerMain())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(cli.Main(ctx, cli.Host{
		Args: os.Args[1:], Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv,
	}))
}
