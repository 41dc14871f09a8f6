package cli_test

import (
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/keys"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

// openState is what a broker does first with a state directory.
func openState(t *testing.T, dir string) *ledger.Ledger {
	t.Helper()
	kinds := capabilities.NewKinds(capabilities.FS{})
	l, err := ledger.Open(t.Context(), ledger.Options{Dir: dir, Kinds: kinds, Clock: clock.System{}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := keys.Open(t.Context(), l, dir, kinds, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	return l
}

func named(t *testing.T, l *ledger.Ledger, name string) {
	t.Helper()
	_, err := l.Update(t.Context(), func(tx *ledger.Tx) error {
		return tx.Append(ledger.Event{
			Type: ledger.NameSet, Actor: ledger.Actor{Kind: ledger.ActorBroker},
			Partition: uuid.New(), Data: ledger.JSON(ledger.NameData{Name: name}),
		})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestLedgerCommands backs up, verifies and restores a real ledger, and makes a
// key without a broker.
func TestLedgerCommands(t *testing.T) {
	dir, backup := filepath.Join(t.TempDir(), "state"), filepath.Join(t.TempDir(), "b.db")
	l := openState(t, dir)
	named(t, l, "first")
	try := func(want int, out, errs string, args ...string) string {
		t.Helper()
		code, stdout, stderr := run(t, "/nonexistent", args...)
		if code != want || !strings.Contains(stdout, out) || !strings.Contains(stderr, errs) {
			t.Errorf("%v: code %d, %q, %q; want %d, %q, %q", args, code, stdout, stderr, want, out, errs)
		}
		return stdout
	}
	var made struct {
		File, Head string
		Epoch, Seq uint64
		Events     int
		Bytes      int64
	}
	if err := json.Unmarshal([]byte(try(0, "", "", "ledger", "backup", "--state", dir, backup, "-o", "json")), &made); err != nil {
		t.Fatal(err)
	}
	if made.File != backup || made.Events != 3 || made.Seq != 3 || made.Epoch != 1 || made.Bytes == 0 || len(made.Head) != 64 {
		t.Errorf("the backup is %+v", made)
	}
	anchor := "3:" + made.Head
	try(1, "", "it exists already", "ledger", "backup", "--state", dir, backup)
	try(2, "", "needs a file to write", "ledger", "backup")
	try(0, "epoch 1: 3 events, anchor "+anchor, "", "ledger", "verify", backup)
	named(t, l, "second")
	try(0, "intact: ledger ", "", "ledger", "verify", "--state", dir, "--anchor", anchor) // beside a broker
	try(1, "", "ledger's chain is broken at event 4: anchor", "ledger", "verify", backup, "--anchor", "4:"+made.Head)
	try(1, "", "in use by another broker: process ", "ledger", "restore", "--state", dir, backup)
	try(1, "", "stop the broker first", "keys", "rotate", "--state", dir)
	for _, bad := range []string{"3", "x:" + made.Head, "0:" + made.Head, "3:12", ""} {
		try(2, "", "--anchor", "ledger", "verify", backup, "--anchor", bad)
	}
	try(2, "", "either a FILE or --state", "ledger", "verify", backup, "--state", dir)
	try(1, "", "there is no ledger to verify", "ledger", "verify", "--state", t.TempDir())
	try(1, "", "no such file", "ledger", "verify", backup+"x")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}

	try(0, "signs from here on", "", "keys", "rotate", "--state", dir)
	openState(t, dir).Close()
	out := try(0, "epoch 2", "", "ledger", "restore", "--state", dir, backup)
	if !strings.Contains(out, "0 grants end when the broker starts") || !strings.Contains(out, "what was there is "+dir+"/ledger.db.replaced-") {
		t.Errorf("it says %s", out)
	}
	l = openState(t, dir)
	l.View(func(s *ledger.State) {
		if s.Epoch() != 2 || len(s.Names()) != 1 {
			t.Errorf("restored: epoch %d, names %v", s.Epoch(), s.Names())
		}
	})
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	try(0, "revoking: 0", "", "ledger", "restore", "--state", dir, backup, "-o", "yaml")

	if err := os.WriteFile(backup, []byte("nothing of the kind"), 0o600); err != nil {
		t.Fatal(err)
	}
	try(1, "", "the backup is not fit", "ledger", "restore", "--state", dir, backup)
	try(2, "", "needs a backup", "ledger", "restore")
	openState(t, dir).Close()
}

// TestLedgerVerifySaysWhatItDidNotSee: an archive that is not there is no error,
// and is said.
func TestLedgerVerifySaysWhatItDidNotSee(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	l := openState(t, dir)
	named(t, l, "first")
	r, err := l.Rotate(t.Context(), ledger.Actor{Kind: ledger.ActorBroker})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, says := range []string{"with archive " + r.Archive.Name, "not verified: events 1 to 3"} {
		code, stdout, stderr := run(t, "/nonexistent", "ledger", "verify", "--state", dir)
		if code != 0 || !strings.Contains(stdout, "intact: ") || !strings.Contains(stdout, says) {
			t.Errorf("code %d, %q, %q; want %q", code, stdout, stderr, says)
		}
		_ = os.Remove(filepath.Join(dir, ledger.ArchiveDir, r.Archive.Name))
	}
}
