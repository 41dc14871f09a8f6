package api_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"spectrum-os.org/broker/broker/api"
)

func TestListenHost(t *testing.T) {
	dir := socketDir(t)
	path := filepath.Join(dir, "s")
	l := must[net.Listener](t)(api.ListenHost(path, 0o660, strconv.Itoa(os.Getgid())))
	info, err := os.Lstat(path)
	if err != nil || info.Mode().Perm() != 0o660 || info.Mode().Type() != os.ModeSocket {
		t.Errorf("the socket is %v, %v", info, err)
	}
	if l.Addr().String() != path {
		t.Errorf("the address is %s", l.Addr())
	}
	if _, err := api.ListenHost(path, 0o660, ""); !errors.Is(err, api.ErrSocketInUse) || !strings.Contains(err.Error(), path) {
		t.Errorf("a second one got %v", err)
	}
	if c, err := net.Dial("unix", path); err != nil {
		t.Errorf("the first one is gone: %v", err)
	} else {
		_ = c.Close()
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("it left %v", left)
	}
}

func TestListenReplacesADeadSocket(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	_ = dead.Close()
	l := must[net.Listener](t)(api.ListenHost(path, 0o600, ""))
	// One that has been replaced in turn leaves its successor alone.
	_ = os.Remove(path)
	next := must[net.Listener](t)(api.ListenHost(path, 0o600, ""))
	defer next.Close()
	_ = l.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the successor's socket is gone: %v", err)
	}
}

func TestListenRefuses(t *testing.T) {
	dir := socketDir(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(file, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for path, why := range map[string]string{
		file:                            "not a socket",
		filepath.Join(dir, "link"):      "not a socket",
		filepath.Join(dir, "none", "s"): "no such file",
		filepath.Join(dir, strings.Repeat("a", 100)): "longer than 107",
	} {
		if _, err := api.ListenHost(path, 0o600, ""); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: got %v, want %q", path, err, why)
		}
	}
	if _, err := api.ListenHost(filepath.Join(dir, "s"), 0o600, "no-such-group"); err == nil || !strings.Contains(err.Error(), "no-such-group") {
		t.Errorf("got %v", err)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("the file is %q, %v", b, err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 2 {
		t.Errorf("it left %v", left)
	}
}

// Of many that start at once over a dead socket exactly one wins.
func TestListenRace(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	_ = dead.Close()
	var won atomic.Int64
	var wg sync.WaitGroup
	start := make(chan struct{})
	for range 16 {
		wg.Go(func() {
			<-start
			l, err := api.ListenHost(path, 0o600, "")
			switch {
			case err == nil:
				won.Add(1)
				t.Cleanup(func() { _ = l.Close() })
			case !errors.Is(err, api.ErrSocketInUse):
				t.Error(err)
			}
		})
	}
	close(start)
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("%d won", won.Load())
	}
}

func TestPeerCred(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, err := api.PeerCred(a); err == nil {
		t.Error("a pipe has credentials")
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Skip("no loopback here:", err)
	}
	defer tcp.Close()
	c, err := net.Dial("tcp", tcp.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got, err := api.PeerCred(c); err == nil && got.PID != 0 {
		t.Errorf("a TCP peer is %+v", got)
	}
}
