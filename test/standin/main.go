package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	o, err := parseArgs(args)
	switch {
	case err != nil:
		fmt.Fprintf(os.Stderr, "error: %v\n\n%s", err, usage)
		return 2
	case o.showHelp:
		fmt.Print(usage)
		return 0
	case o.showVer:
		fmt.Printf("cloud-hypervisor %s\n", buildVersion)
		return 0
	}
	code, err := serve(o)
	if err != nil {
		fmt.Fprintf(os.Stderr, "error: %v\n", err)
		return 1
	}
	return code
}

func serve(o options) (int, error) {
	// Descriptors that our parent gave us are ours alone: QEMU gets those that
	// it is told of.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return 1, fmt.Errorf("cannot keep descriptors from children: %w", err)
	}
	logTo := os.Stderr
	if o.logFile != "" {
		f, err := os.Create(o.logFile)
		if err != nil {
			return 1, err
		}
		defer f.Close()
		logTo = f
	}
	level := slog.LevelWarn - slog.Level(4*o.verbosity)
	log := slog.New(slog.NewTextHandler(logTo, &slog.HandlerOptions{Level: level}))

	h := &host{spawn: newSpawner(), stderr: logTo, log: log, fsWait: 60 * time.Second, stopping: make(chan struct{})}
	var err error
	if h.qemu, err = program("SPECTRUM_QEMU", "qemu-system-x86_64"); err != nil {
		return 1, err
	}
	if h.vsock, err = program("SPECTRUM_VHOST_DEVICE_VSOCK", "vhost-device-vsock"); err != nil {
		return 1, err
	}
	if h.events, err = openMonitor(o.events); err != nil {
		return 1, fmt.Errorf("cannot open the event monitor: %w", err)
	}
	h.events.say("vmm", "starting")
	listener, err := listen(o.api)
	if err != nil {
		return 1, fmt.Errorf("cannot create the API socket: %w", err)
	}

	m := newMachine(h, o.noShutdown)
	server := &http.Server{Handler: m.handler(), ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
	go func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			log.Error("API server ended", "error", err)
			m.quit(1)
		}
	}()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	code := 0
	select {
	case code = <-m.exit:
	case <-signals:
		close(h.stopping)
		m.turn.Lock()
		m.shutdownVMM()
		m.turn.Unlock()
	}
	// The call that ended the VMM gets its answer.
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = server.Shutdown(ctx)
	// Nothing may be left of a guest whose call was cut off.
	m.turn.Lock()
	m.drop()
	return code, nil
}

// listen makes the API socket, or takes the one that was inherited. A socket
// that a dead VMM left is replaced.
func listen(e endpoint) (net.Listener, error) {
	if e.fd >= 0 {
		f := os.NewFile(uintptr(e.fd), "api-socket")
		defer f.Close()
		return net.FileListener(f)
	}
	if err := os.Remove(e.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	listener, err := net.Listen("unix", e.path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(e.path, 0o600); err != nil {
		listener.Close()
		return nil, err
	}
	return listener, nil
}

// program finds a program by the variable that names it, on PATH, or among the
// crates in the user's cache.
func program(variable, name string) (string, error) {
	if path := os.Getenv(variable); path != "" {
		return exec.LookPath(path)
	}
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("cannot find %s: set %s", name, variable)
	}
	path, err := exec.LookPath(filepath.Join(cache, "spectrum-broker", "crates", "bin", name))
	if err != nil {
		return "", fmt.Errorf("cannot find %s: set %s", name, variable)
	}
	return path, nil
}
