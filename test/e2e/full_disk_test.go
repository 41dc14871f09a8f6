package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/broker/api"
)

// TestRevokeOnFullDisk takes grants back while the ledger cannot be written:
// access ends all the same, stays ended when the broker is killed, and is on
// record once there is room.
func TestRevokeOnFullDisk(t *testing.T) {
	state, err := os.MkdirTemp("", "e2e-disk-")
	if err == nil {
		err = unix.Mount("tmpfs", state, "tmpfs", 0, "size=1m,mode=0700")
	}
	if err != nil {
		t.Fatal(err)
	}
	// Before the desktop, which looks at its ledger when it ends.
	t.Cleanup(func() {
		if err := errors.Join(unix.Unmount(state, unix.MNT_DETACH), os.Remove(state)); err != nil {
			t.Error(err)
		}
	})
	w := newWorld(t)
	w.State = state
	p := w.partition(map[string]string{"docs/a.txt": "alpha\n", "more/a.txt": "beta\n"})
	vm := w.vm(p, "reader", smallVM)
	w.start()
	g := w.boot(vm)[0]
	ballast := filepath.Join(state, "ballast")
	revokeUnrecorded := func(label, path string) uuid.UUID {
		t.Helper()
		grant := w.grant(vm, fs("ro", p, path), label)
		served := w.serving(vm, grant.ID)
		if err := os.WriteFile(ballast, make([]byte, 2<<20), 0o600); err == nil {
			t.Fatal("the disk is not full")
		}
		// What room the ledger has left in its file is used up.
		for i := 0; ; i++ {
			_, err := w.Client.SetName(w.ctx(10*time.Second), fmt.Sprintf("%s-%d", label, i), p.ID)
			if err != nil {
				break
			}
			if i > 5000 {
				t.Fatal("a full disk refuses nothing")
			}
		}
		_, err := w.Client.Revoke(w.ctx(time.Minute), api.RevokeRequest{IDs: []string{grant.ID.String()}, Wait: true})
		var refused *api.Error
		if !errors.As(err, &refused) || refused.Code != api.CodeUnavailable || !strings.Contains(err.Error(), "access was cut, but") {
			t.Errorf("the revocation says %v", err)
		}
		w.allDead(served)
		if g.reads(label, "alpha") == nil {
			t.Errorf("the guest still reads %s", label)
		}
		return grant.ID
	}

	first := revokeUnrecorded("first", "/docs")
	w.must(os.Remove(ballast))
	w.eventually(20*time.Second, func() error { return w.ended(first, "revoked by a person") })

	second := revokeUnrecorded("second", "/docs")
	w.crash()
	w.must(os.Remove(ballast))
	w.start()
	w.must(w.ended(second, "revoked by a person"))
	w.nothingServed(vm)
	if left, _ := filepath.Glob(filepath.Join(w.Dir, "run", "tombstones", "*")); len(left) > 0 {
		t.Errorf("tombstones are left: %v", left)
	}
}
