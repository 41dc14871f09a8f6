package clock

import (
	"context"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestChangesIsQuiet: nobody is told of time that merely passes, and nothing is
// left when it is no longer wanted.
func TestChangesIsQuiet(t *testing.T) {
	before := runtime.NumGoroutine()
	ctx, cancel := context.WithCancel(t.Context())
	changes, err := Changes(ctx)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-changes:
		t.Error("told of a change, and there was none")
	case <-time.After(100 * time.Millisecond):
	}
	cancel()
	for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it goes on watching")
		}
	}
}

// TestWatch has the kernel's answers one after the other: two changes, of which
// nobody takes the first, a third one, and the end.
func TestWatch(t *testing.T) {
	cancelled := &os.PathError{Op: "read", Path: "timerfd", Err: unix.ECANCELED}
	answers := make(chan error)
	armed := make(chan struct{}, 8)
	out := make(chan struct{}, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		watch(func([]byte) (int, error) { return 0, <-answers }, func() error { armed <- struct{}{}; return nil }, out)
	}()
	answers <- cancelled
	<-armed
	answers <- cancelled
	<-armed
	<-out
	answers <- cancelled
	<-armed
	<-out
	answers <- os.ErrClosed
	<-done
	select {
	case <-out:
		t.Error("told of its own end")
	default:
	}
}
