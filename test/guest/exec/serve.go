package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/test/guest/execclient"
)

func serve([]string) error {
	for {
		l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, execclient.Port, nil)
		for err == nil {
			var conn net.Conn
			if conn, err = l.Accept(); err == nil {
				go handle(conn)
			}
		}
		fmt.Fprintln(os.Stderr, "spectrum-test-exec: listening again:", err)
		if l != nil {
			_ = l.Close()
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// frames writes the service's messages, one at a time.
type frames struct {
	mu  sync.Mutex
	enc *json.Encoder
}

func (f *frames) send(m execclient.Frame) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.enc.Encode(m)
}

// stream sends what is written to it as one of the two outputs.
type stream func(b []byte) error

func (s stream) Write(b []byte) (int, error) { return len(b), s(b) }

func handle(conn net.Conn) {
	defer conn.Close()
	out := &frames{enc: json.NewEncoder(conn)}
	in := bufio.NewReader(conn)
	line, err := in.ReadBytes('\n')
	if err != nil {
		return
	}
	var c execclient.Command
	if err := json.Unmarshal(line, &c); err != nil || len(c.Argv) == 0 {
		_ = out.send(execclient.Frame{Error: "not a command"})
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		// The client says nothing more: whatever ends this read ends the command.
		_, _ = io.Copy(io.Discard, in)
		cancel()
	}()
	status, err := run(ctx, c, out)
	if err != nil {
		_ = out.send(execclient.Frame{Error: err.Error()})
		return
	}
	_ = out.send(execclient.Frame{Exit: &status})
}

func run(ctx context.Context, c execclient.Command, out *frames) (int, error) {
	cmd := exec.CommandContext(ctx, c.Argv[0], c.Argv[1:]...)
	cmd.Env = append([]string{"PATH=/bin", "HOME=/root", "USER=root"}, c.Env...)
	cmd.Dir = "/"
	cmd.Stdin = bytes.NewReader(c.Stdin)
	cmd.Stdout = stream(func(b []byte) error { return out.send(execclient.Frame{Stdout: b}) })
	cmd.Stderr = stream(func(b []byte) error { return out.send(execclient.Frame{Stderr: b}) })
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if c.UID != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: c.UID, Gid: c.UID}
	}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	// A background child that keeps the output open must not hold the answer.
	cmd.WaitDelay = 500 * time.Millisecond
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	err := cmd.Wait()
	if err != nil && cmd.ProcessState == nil && !errors.Is(err, exec.ErrWaitDelay) {
		return 0, err
	}
	status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ok && status.Signaled() {
		return 128 + int(status.Signal()), nil
	}
	return cmd.ProcessState.ExitCode(), nil
}
