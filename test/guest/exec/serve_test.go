package main

import (
	"context"
	"net"
	"testing"
	"time"

	"spectrum-os.org/broker/test/guest/execclient"
)

func client(t *testing.T) *execclient.Client {
	t.Helper()
	return execclient.New(func(context.Context) (net.Conn, error) {
		here, there := net.Pipe()
		go handle(there)
		return here, nil
	})
}

func TestCommand(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	r, err := client(t).RunCommand(ctx, execclient.Command{
		Argv: []string{"sh", "-c", `cat; printf '\377' >&2; exit 3`}, Stdin: []byte("in\x00\xfe"),
	})
	if err != nil || r.Exit != 3 || string(r.Stdout) != "in\x00\xfe" || string(r.Stderr) != "\xff" {
		t.Fatalf("%+v, %v", r, err)
	}
	if r, err := client(t).Run(ctx, "sh", "-c", "kill -9 $$"); err != nil || r.Exit != 137 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := client(t).Run(ctx, "no-such-program"); err == nil {
		t.Error("ran what does not exist")
	}
	if _, err := client(t).Output(ctx, "false"); err == nil {
		t.Error("status 1 is no error")
	}
}

func TestCommandDiesWithItsConnection(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	mark := t.TempDir() + "/alive"
	p, err := client(t).Start(ctx, execclient.Command{Argv: []string{"sh", "-c", "echo up; while :; do date +%N >" + mark + "; sleep 0.05; done"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AwaitOutput(ctx, "up"); err != nil {
		t.Fatal(err)
	}
	p.Kill()
	still := func() string { r, _ := client(t).Output(ctx, "sh", "-c", "cat "+mark+"; true"); return r }
	for before := ""; ; {
		time.Sleep(200 * time.Millisecond)
		now := still()
		if now == before {
			return
		}
		if before = now; ctx.Err() != nil {
			t.Fatal("the command runs on")
		}
	}
}
