package applyfs

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"spectrum-os.org/broker/broker/reconcile"
	"spectrum-os.org/broker/vmm/shim"
)

// A VM that dies while it is given a share speaks against no grant: whoever
// persists gets it in the next run.
func TestVMDiesWhileItIsGivenAShare(t *testing.T) {
	virtiofsd(t)
	for i := range 5 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			w := newWorld(t)
			v := w.real()
			v.say("crash-in-add")
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			_, err := New(w, time.Second).Apply(ctx, w.object("a", 1, w.capability("/docs", "read")))
			if !errors.Is(err, reconcile.ErrNotNow) {
				t.Errorf("applied to a VM that died meanwhile: %v, want %v", err, reconcile.ErrNotNow)
			}
		})
	}
}

// The same where the shim dies with it, and where it is dead already and the
// broker has yet to notice.
func TestShimDiesWhileItIsAsked(t *testing.T) {
	virtiofsd(t)
	for _, place := range []string{beforePut, whilePut} {
		t.Run(place, func(t *testing.T) {
			w := newWorld(t)
			v := w.real()
			v.say("hang-in-add")
			w.seams.arm(place, func() {
				if err := v.Kill(); err != nil {
					t.Error(err)
				}
			})
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			_, err := New(w, time.Second).Apply(ctx, w.object("a", 1, w.capability("/docs", "read")))
			if !errors.Is(err, reconcile.ErrNotNow) {
				t.Errorf("applied to a VM that died meanwhile: %v, want %v", err, reconcile.ErrNotNow)
			}
		})
	}
}

// What a shim says, or its silence, ends no run that goes on. Its silence is worth
// another attempt; what it says is final.
func TestWhatSpeaksOfNoRun(t *testing.T) {
	for name, c := range map[string]struct {
		err    error
		gone   bool // the VM, for the host
		notNow bool
		again  bool
	}{
		"not running":    {err: refuse(shim.CodeNotRunning, "x"), notNow: true},
		"another run":    {err: refuse(shim.CodeWrongInstance, "x"), notNow: true},
		"no shim":        {err: fmt.Errorf("cannot put: %w", shim.ErrNoShim), notNow: true},
		"gone meanwhile": {err: context.DeadlineExceeded, gone: true, notNow: true},
		"too slow":       {err: context.DeadlineExceeded, again: true},
		"hung up":        {err: errors.New("the shim closed the connection"), again: true},
		"removed":        {err: refuse(shim.CodeRemoved, "x")},
		"VMM's refusal":  {err: refuse(shim.CodeVMM, "x")},
		"refusal, gone":  {err: refuse(shim.CodeBadRequest, "x"), gone: true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			s := w.fake()
			s.putErr = c.err
			o := w.object("a", 1, w.capability("/docs", "read"))
			if c.gone {
				w.seams.arm(beforePut, func() { w.set(nil) })
			}
			_, err := w.apply(o)
			if !errors.Is(err, c.err) || errors.Is(err, reconcile.ErrNotNow) != c.notNow {
				t.Errorf("error %v; not now: want %v", err, c.notNow)
			}
			if again := errors.Is(err, reconcile.ErrTransient); again != c.again {
				t.Errorf("error %v; to be tried again is %v, want %v", err, again, c.again)
			}
		})
	}
}
