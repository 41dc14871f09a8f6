package cli_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
)

// TestEveryEventIsReadable has an event of each type of the ledger as the broker
// records it, and its row's detail.
func TestEveryEventIsReadable(t *testing.T) {
	grant := uuid.MustParse("dddddddd-0000-4000-8000-000000000005")
	revision := strings.Repeat("ab", 16)
	capability := fmt.Sprintf(`{"kind":"fs","resource":{"partition":%q,"path":"/a"},"rights":["read","write"]}`, work)
	type row struct {
		typ           ledger.EventType
		partition, vm bool
		data          string
		want          string // after TYPE and ACTOR
	}
	rows := []row{
		{ledger.LedgerCreated, false, false, `{"ledger":"` + grant.String() + `","epoch":3}`, "- - epoch 3"},
		{ledger.LedgerRotated, false, false, `{"ledger":"` + grant.String() + `","epoch":3,"archive":"ledger-1-9-0a0b0c0d.db","first":1,"last":9,"carried":2}`, "- - epoch 3; archive ledger-1-9-0a0b0c0d.db"},
		{ledger.LedgerCarried, false, false, `{"carries":"grants","count":40}`, "- - 40 grants"},
		{ledger.GrantRequested, true, true, `{"instance":"r1","capability":` + capability + `,"label":"a"}`, "aaaaaaaa dddddddd fs:rw:work:/a; a; run r1"},
		{ledger.GrantDenied, true, true, `{"action":"grant","capability":` + capability + `,"spelling":"fs:rw:job:/a","reason":"work says no"}`, "aaaaaaaa - fs:rw:job:/a; work says no"},
		{ledger.GrantActive, true, true, `{"reason":"attached"}`, "aaaaaaaa dddddddd attached"},
		{ledger.GrantFailed, true, true, `{"reason":"no slot"}`, "aaaaaaaa dddddddd no slot"},
		{ledger.GrantRevoking, true, true, `{"reason":"asked to"}`, "aaaaaaaa dddddddd asked to"},
		{ledger.GrantRevoked, true, true, ``, "aaaaaaaa dddddddd"},
		{ledger.GrantRenewed, true, true, `{"deadline":{"wall":"2026-01-02T03:04:05Z","boot_id":"b","boot_ns":1},"decision":{}}`, "aaaaaaaa dddddddd until 2026-01-02T03:04:05Z"},
		{ledger.GrantDegraded, true, true, `{"reason":"killed"}`, "aaaaaaaa dddddddd killed"},
		{ledger.GrantUsed, true, true, `{"instance":"r1"}`, "aaaaaaaa dddddddd run r1"},
		{ledger.GrantTroubled, true, true, `{"reason":"cannot attach: nobody answers"}`, "aaaaaaaa dddddddd cannot attach: nobody answers"},
		{ledger.GrantRecovered, true, true, ``, "aaaaaaaa dddddddd"},
		{ledger.TokenIssued, false, false, ``, "- dddddddd"},
		{ledger.TokenRefused, true, true, `{"reason":"expired"}`, "aaaaaaaa dddddddd expired"},
		{ledger.GuestLimited, true, true, ``, "aaaaaaaa -"},
		{ledger.VMBound, true, true, `{"alias":"mail"}`, "aaaaaaaa - mail"},
		{ledger.VMStarted, true, true, `{"instance":"r1"}`, "aaaaaaaa - run r1"},
		{ledger.VMExited, true, true, `{"instance":"r1","reason":"the guest shut down"}`, "aaaaaaaa - the guest shut down; run r1"},
		{ledger.VMConsole, true, true, ``, "aaaaaaaa -"},
		{ledger.NameSet, true, false, `{"name":"job"}`, "- - partition 11111111: job"},
		{ledger.NameRemoved, true, false, `{"name":"job"}`, "- - partition 11111111: job"},
		{ledger.PolicyLoaded, true, false, `{"engine":"` + work.String() + `","revision":"` + revision + `"}`, "- - partition work: revision abababababab"},
		{ledger.PolicyLoaded, false, false, `{"engine":"host","revision":"` + revision + `"}`, "- - the host; revision abababababab"},
		{ledger.PolicyRejected, true, false, `{"engine":"` + work.String() + `","error":"p.rego:3:1: no"}`, "- - partition work: p.rego:3:1: no"},
		{ledger.BrokerStarted, false, false, `{"version":"v1.2","pid":47}`, "- - version v1.2; pid 47"},
		{ledger.BrokerStopped, false, false, ``, "- -"},
		{ledger.KeyCreated, false, false, `{"kid":"00112233","public":"AAAA"}`, "- - key 00112233"},
		{ledger.KeyRevoked, false, false, `{"kid":"00112233","reason":"stolen"}`, "- - stolen; key 00112233"},
		{ledger.TokenIssued, false, false, `{"kid":"00112233"}`, "- dddddddd key 00112233"},
		{ledger.LedgerRestored, false, false, `{"epoch":4,"reason":"the ledger was restored from a backup","from":{"seq":7}}`, "- - the ledger was restored from a backup; epoch 4"},
		{ledger.ClockHighwater, false, false, `{"wall":"2026-01-02T03:04:05Z"}`, "- - 2026-01-02T03:04:05Z"},
	}
	f := newFake()
	f.events = nil
	for _, r := range rows {
		var vm, about *uuid.UUID
		if r.vm {
			vm = &workVM
		}
		if strings.Contains(r.want, "dddddddd") {
			about = &grant
		}
		f.record(string(r.typ), vm, about, r.data)
		e := &f.events[len(f.events)-1]
		if r.data == "" {
			e.Data = json.RawMessage(nil)
		}
		if r.partition {
			e.Partition = &work
		}
	}
	code, stdout, stderr := run(t, serve(t, f), "audit")
	lines := strings.Split(strings.TrimSpace(stdout), "\n")[1:]
	if code != 0 || len(lines) != len(rows) {
		t.Fatalf("code %d, %d lines, %s", code, len(lines), stderr)
	}
	for i, r := range rows {
		got := strings.Join(strings.Fields(lines[i])[3:], " ") // without SEQ and TIME
		if want := string(r.typ) + " broker " + r.want; got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
	for _, typ := range ledger.EventTypes() {
		if !slices.ContainsFunc(rows, func(r row) bool { return r.typ == typ }) {
			t.Errorf("%s: its row is not looked at", typ)
		}
	}
}

// TestTypesAreCompleted: a new type cannot be forgotten.
func TestTypesAreCompleted(t *testing.T) {
	_, stdout, _ := run(t, "/nonexistent", "__complete", "audit", "--type", "")
	words := strings.Split(stdout, "\n")
	for _, typ := range ledger.EventTypes() {
		topic, _, _ := strings.Cut(string(typ), ".")
		if !slices.Contains(words, string(typ)) || !slices.Contains(words, topic+".") {
			t.Errorf("%s is not offered:\n%s", typ, stdout)
		}
	}
	if len(ledger.EventTypes()) < 20 {
		t.Error("there are hardly any types")
	}
}
