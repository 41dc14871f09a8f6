package clock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Changes returns a channel that receives when the wall clock was set, or the
// machine resumed from a suspend, until ctx ends. Wake-ups are coalesced. Go's
// timers stop during a suspend, so whoever waits for a deadline looks at the
// clock again at each.
func Changes(ctx context.Context) (<-chan struct{}, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_REALTIME, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("cannot watch the clock: %w", err)
	}
	f := os.NewFile(uintptr(fd), "timerfd")
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot watch the clock: %w", err), f.Close())
	}
	arm := func() (err error) {
		// Never due: what is waited for is that it is cancelled.
		far := unix.ItimerSpec{Value: unix.NsecToTimespec(time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC).UnixNano())}
		closed := raw.Control(func(fd uintptr) {
			err = unix.TimerfdSettime(int(fd), unix.TFD_TIMER_ABSTIME|unix.TFD_TIMER_CANCEL_ON_SET, &far, nil)
		})
		return errors.Join(closed, err)
	}
	if err := arm(); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot watch the clock: %w", err), f.Close())
	}
	context.AfterFunc(ctx, func() { _ = f.Close() })
	out := make(chan struct{}, 1)
	go watch(f.Read, arm, out)
	return out, nil
}

// watch tells of each cancellation until the descriptor is closed.
func watch(read func([]byte) (int, error), arm func() error, out chan<- struct{}) {
	var expirations [8]byte
	for {
		_, err := read(expirations[:])
		if err != nil && !errors.Is(err, unix.ECANCELED) {
			return
		}
		// Armed before anybody is told: a change while they look is the next one.
		if err := arm(); err != nil && !errors.Is(err, unix.ECANCELED) {
			return
		}
		select {
		case out <- struct{}{}:
		default:
		}
	}
}
