package app

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/agents/wire"
)

// Run is the agent of a real guest, until ctx ends.
func Run(ctx context.Context, version string, log *slog.Logger) error {
	if err := os.MkdirAll(wire.MountRoot, 0o755); err != nil {
		return fmt.Errorf("cannot make %s: %w", wire.MountRoot, err)
	}
	mounts, err := NewMounts(Linux{}, log)
	if err != nil {
		return err
	}
	bootID, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return fmt.Errorf("cannot read the boot id: %w", err)
	}
	health := wire.Health{Agent: "spectrum-agent", Version: wire.Printable(version, 64), Role: "app", BootID: strings.TrimSpace(string(bootID))}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var watch sync.WaitGroup
	defer watch.Wait()
	watch.Go(func() { Watch(ctx, mounts, Uevents, log) })
	err = Serve(ctx, NewServer(mounts, health, log).HTTP(), listenVsock, log)
	cancel()
	return err
}

// listenVsock listens on any CID: the guest's own may change when it is
// restored from a snapshot.
func listenVsock() (net.Listener, error) {
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, wire.Port, nil)
	if err != nil {
		return nil, err
	}
	return hostOnly{Listener: l, from: fromHost}, nil
}

func fromHost(a net.Addr) bool {
	peer, ok := a.(*vsock.Addr)
	return ok && peer.ContextID == unix.VMADDR_CID_HOST
}

// DialBroker connects to the broker's guest API. The kernel bounds the
// attempt; ctx bounds it further.
func DialBroker(ctx context.Context) (net.Conn, error) {
	type result struct {
		conn *vsock.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		conn, err := vsock.Dial(unix.VMADDR_CID_HOST, wire.GuestPort, nil)
		done <- result{conn, err}
	}()
	select {
	case r := <-done:
		if r.err != nil {
			return nil, r.err
		}
		return r.conn, nil
	case <-ctx.Done():
		go func() {
			if r := <-done; r.err == nil {
				_ = r.conn.Close()
			}
		}()
		return nil, ctx.Err()
	}
}
