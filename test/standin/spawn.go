package main

import (
	"errors"
	"os"
	"os/exec"
	"runtime"
	"syscall"
)

// spawner starts children that the kernel kills when the stand-in dies.
//
// The parent-death signal fires when the *thread* that forked ends, and Go
// ends threads as it pleases. So one goroutine keeps one thread for the life
// of the process, and every child is started there.
type spawner struct {
	work chan func()
}

func newSpawner() *spawner {
	s := &spawner{work: make(chan func())}
	go func() {
		runtime.LockOSThread()
		for f := range s.work {
			f()
		}
	}()
	return s
}

// child is a process that was started, until it has been waited for.
type child struct {
	cmd  *exec.Cmd
	gone chan struct{}
	err  error // of Wait; valid once gone is closed
}

// start runs the program with the files as descriptors 3, 4, …
func (s *spawner) start(argv []string, files []*os.File, stderr *os.File) (*child, error) {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.ExtraFiles = files
	cmd.Stdout, cmd.Stderr = stderr, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	result := make(chan error, 1)
	s.work <- func() { result <- cmd.Start() }
	if err := <-result; err != nil {
		return nil, err
	}
	c := &child{cmd: cmd, gone: make(chan struct{})}
	go func() {
		c.err = cmd.Wait()
		close(c.gone)
	}()
	return c, nil
}

// kill ends the child and waits until it is gone, so that its sockets are
// closed when kill returns.
func (c *child) kill() {
	if c == nil {
		return
	}
	if err := c.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return
	}
	<-c.gone
}
