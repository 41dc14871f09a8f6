package applyfs

import (
	"errors"
	"testing"
	"time"

	"spectrum-os.org/broker/broker/reconcile"
	"spectrum-os.org/broker/broker/reconcile/conformance"
	"spectrum-os.org/broker/vmm/shim"
)

// harness is all of a harness that does not depend on the shim.
func (w *world) harness() conformance.Harness {
	c := w.capability("/docs", "read", "write")
	places := func(names ...string) map[string]func(func()) {
		out := map[string]func(func()){}
		for _, name := range names {
			out[name] = func(leave func()) { w.seams.arm(name, leave) }
		}
		return out
	}
	return conformance.Harness{
		New: func() reconcile.Applier { return New(w, time.Second) },
		Object: func(name string, generation uint64) reconcile.Object {
			o := w.object(name, generation, c)
			o.Label = "label"
			return o
		},
		Stale: func(err error) bool {
			return errors.Is(err, &shim.Error{Code: shim.CodeStaleGeneration})
		},
		Interrupt:         places(beforePut, whilePut, afterPut, whileMount),
		InterruptWithdraw: places(beforeRemove, whileRemove),
	}
}

func TestConformanceOnAFakeShim(t *testing.T) {
	conformance.Run(t, func(t *testing.T) conformance.Harness {
		w := newWorld(t)
		s := w.fake()
		h := w.harness()
		h.World = func() map[string]conformance.Thing {
			s.mu.Lock()
			defer s.mu.Unlock()
			out := map[string]conformance.Thing{}
			for id, o := range s.objects {
				if o.phase != shim.Gone {
					out[id] = conformance.Thing{Generation: o.spec.Generation, Identity: o.identity}
				}
			}
			return out
		}
		h.Lose, h.Reboot = s.lose, s.reboot
		h.Stop = func() {
			s.close()
			w.set(nil)
		}
		return h
	})
}
