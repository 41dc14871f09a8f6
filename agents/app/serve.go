package app

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// Listen opens the agent's listener.
type Listen func() (net.Listener, error)

// Serve answers on what listen opens until ctx ends. A listener that fails,
// as one does when the vsock device is reset or replaced, is opened again.
func Serve(ctx context.Context, srv *http.Server, listen Listen, log *slog.Logger) error {
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	const first, longest = 50 * time.Millisecond, 2 * time.Second
	for wait := first; ; {
		l, err := listen()
		if err == nil {
			log.Info("listening", "on", l.Addr().String())
			started := time.Now()
			err = srv.Serve(l)
			_ = l.Close()
			if time.Since(started) > longest {
				wait = first
			}
		}
		if ctx.Err() != nil || errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		log.Warn("listening again", "after", wait, "error", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = min(2*wait, longest)
	}
}

// hostOnly is a listener that turns away every peer but those from accepts.
type hostOnly struct {
	net.Listener
	from func(net.Addr) bool
}

func (l hostOnly) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil || l.from(conn.RemoteAddr()) {
			return conn, err
		}
		_ = conn.Close()
	}
}

// Watch tells m about devices that come and go until ctx ends, and never without
// an event: m asks its mounts whether they are gone, and a request to a device
// that no longer answers would hold up that device's removal, and with it the
// guest's hot-plug, for good.
func Watch(ctx context.Context, m *Mounts, events func(ctx context.Context, wake func(gone bool)) error, log *slog.Logger) {
	var reader sync.WaitGroup
	defer reader.Wait()
	wake := make(chan struct{}, 1)
	var someGone atomic.Bool
	reader.Go(func() {
		for ctx.Err() == nil {
			err := events(ctx, func(gone bool) {
				if gone {
					someGone.Store(true)
				}
				select {
				case wake <- struct{}{}:
				default:
				}
			})
			if ctx.Err() == nil {
				log.Warn("device events are not to be had", "error", err)
				pause(ctx, time.Second)
			}
		}
	})
	for {
		select {
		case <-ctx.Done():
			return
		case <-wake:
		}
		m.DevicesChanged(someGone.Swap(false))
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
