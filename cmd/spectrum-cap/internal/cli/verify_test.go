package cli_test

import (
	"database/sql"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

// TestVerifyOffline reads a real ledger, whole and with one byte changed.
func TestVerifyOffline(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	l, err := ledger.Open(t.Context(), ledger.Options{Dir: dir, Kinds: capabilities.NewKinds(capabilities.FS{}), Clock: clock.System{}})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		_, err := l.Update(t.Context(), func(tx *ledger.Tx) error {
			return tx.Append(ledger.Event{
				Type: ledger.NameSet, Actor: ledger.Actor{Kind: ledger.ActorBroker},
				Partition: uuid.New(), Data: ledger.JSON(ledger.NameData{Name: "p" + uuid.NewString()[:8]}),
			})
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	verify := func(want int, out, errs string) {
		t.Helper()
		code, stdout, stderr := run(t, "/nonexistent", "audit", "verify", "--state", dir)
		if code != want || !strings.HasPrefix(stdout, out) || !strings.Contains(stderr, errs) {
			t.Errorf("code %d, %q, %q; want %d, %q, %q", code, stdout, stderr, want, out, errs)
		}
	}
	verify(0, "intact: 4 events, head ", "") // beside a live broker
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	verify(0, "intact: 4 events, head ", "")

	db, err := sql.Open("sqlite", filepath.Join(dir, "ledger.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.ExecContext(t.Context(), `UPDATE events SET body = CAST(substr(body, 1, length(body) - 1) || X'00' AS BLOB) WHERE seq = 3`); err != nil {
		t.Fatal(err)
	}
	verify(1, "", "the audit is broken at event 3: hash mismatch")
}
