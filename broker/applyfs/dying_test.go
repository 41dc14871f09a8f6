package applyfs

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"spectrum-os.org/broker/broker/reconcile"
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
