package broker

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"spectrum-os.org/broker/agents/wire"
	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/sources"
)

var (
	workID = uuid.MustParse("11111111-1111-4111-8111-111111111111")
	homeID = uuid.MustParse("11111111-2222-4222-8222-222222222222")
	mail1  = uuid.MustParse("aaaaaaaa-1111-4111-8111-111111111111")
	mail2  = uuid.MustParse("aaaaaaaa-2222-4222-8222-222222222222")
	netVM  = uuid.MustParse("bbbbbbbb-3333-4333-8333-333333333333")
)

// named is a broker that knows two partitions, each with a VM called mail, and
// a built-in VM.
func named(t *testing.T) *Broker {
	t.Helper()
	kinds := capabilities.NewKinds(capabilities.FS{})
	l, err := ledger.Open(context.Background(), ledger.Options{Dir: t.TempDir(), Kinds: kinds, Clock: clock.System{}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	b := &Broker{log: slog.New(slog.DiscardHandler), kinds: kinds, ledger: l, running: map[uuid.UUID]*unit{}}
	b.metrics = newMetrics(b)
	def := func(id, partition uuid.UUID, alias string) sources.Definition {
		return sources.Definition{ID: id, Partition: partition, Alias: alias, Aliases: []string{alias}}
	}
	b.inventory.Store(&inventory{
		partitions: map[uuid.UUID]sources.Partition{workID: {ID: workID}, homeID: {ID: homeID}},
		definitions: map[uuid.UUID]sources.Definition{
			mail1: def(mail1, workID, "mail"), mail2: def(mail2, homeID, "mail"), netVM: def(netVM, uuid.Nil, "net"),
		},
	})
	if _, err := b.SetName(context.Background(), api.Caller{Kind: api.CallerPerson}, "work", workID); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestResolveVM(t *testing.T) {
	b := named(t)
	for _, c := range []struct {
		ref  string
		want uuid.UUID
		code api.Code
	}{
		{"work/mail", mail1, ""},
		{homeID.String() + "/mail", mail2, ""},
		{"11111111-2/mail", mail2, ""},
		{"builtin/net", netVM, ""},
		{"net", netVM, ""},
		{mail1.String(), mail1, ""},
		{"AAAAAAAA-1", mail1, ""},
		{"mail", uuid.Nil, api.CodeAmbiguous},
		{"aaaaaaaa", uuid.Nil, api.CodeAmbiguous},
		{"11111111/mail", uuid.Nil, api.CodeAmbiguous},
		{"aaaaaaa", uuid.Nil, api.CodeNotFound},
		{"home/mail", uuid.Nil, api.CodeNotFound},
		{"work/net", uuid.Nil, api.CodeNotFound},
		{"builtin/mail", uuid.Nil, api.CodeNotFound},
		{"", uuid.Nil, api.CodeInvalid},
	} {
		got, err := b.resolveVM(c.ref)
		if c.code == "" && (err != nil || got != c.want) {
			t.Errorf("%q is %s, %v; want %s", c.ref, got, err, c.want)
		}
		if c.code != "" && api.CodeOf(err) != c.code {
			t.Errorf("%q: %v, want code %s", c.ref, err, c.code)
		}
	}
	_, err := b.resolveVM("mail")
	e, _ := asAPI(err)
	if e == nil || !slices.Equal(e.Candidates, []string{"11111111/mail", "work/mail"}) {
		t.Errorf("candidates of an alias that two VMs share: %+v", e)
	}
}

// TestAliasLikeAUUID has a partition call a VM of its own what another VM's UUID
// is, or begins with.
func TestAliasLikeAUUID(t *testing.T) {
	b := named(t)
	inv := *b.inventory.Load()
	for _, alias := range []string{netVM.String(), netVM.String()[:12]} {
		d := sources.Definition{ID: mail2, Partition: homeID, Alias: alias, Aliases: []string{alias}}
		inv.definitions = map[uuid.UUID]sources.Definition{netVM: inv.definitions[netVM], mail2: d}
		b.inventory.Store(&inv)
		if got, err := b.resolveVM(netVM.String()); err != nil || got != netVM {
			t.Errorf("alias %q: the UUID is %s, %v", alias, got, err)
		}
	}
	if _, err := b.resolveVM(netVM.String()[:12]); api.CodeOf(err) != api.CodeAmbiguous {
		t.Errorf("an alias like a prefix: %v", err)
	}
}

func TestPetnames(t *testing.T) {
	b := named(t)
	me := api.Caller{Kind: api.CallerPerson}
	for name, says := range map[string]string{
		"Work": "cannot name", "a:b": "cannot name", "a/b": "cannot name", "": "cannot name", "builtin": "cannot name",
		"self": "cannot name", "host": "cannot name", "deadbeef": "cannot name", "work": "is named",
		strings.Repeat("a", 64): "cannot name",
	} {
		if _, err := b.SetName(context.Background(), me, name, homeID); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v, want %q", name, err, says)
		}
	}
	if _, err := b.SetName(context.Background(), me, "stick", uuid.New()); api.CodeOf(err) != api.CodeNotFound {
		t.Errorf("a partition that is not there: %v", err)
	}
	if err := b.RemoveName(context.Background(), me, "work"); err != nil {
		t.Error(err)
	}
	if err := b.RemoveName(context.Background(), me, "work"); api.CodeOf(err) != api.CodeNotFound {
		t.Errorf("removed twice: %v", err)
	}
	if _, err := b.SetName(context.Background(), me, "work", homeID); err != nil {
		t.Errorf("a free name: %v", err)
	}
}

func TestGuestsLearnNoNames(t *testing.T) {
	r := selfResolver{workID}
	if id, err := r.Partition("self"); err != nil || id != workID {
		t.Errorf("self is %s, %v", id, err)
	}
	if id, err := r.Partition(homeID.String()); err != nil || id != homeID {
		t.Errorf("a UUID is %s, %v", id, err)
	}
	for _, name := range []string{"work", "11111111", "builtin", ""} {
		if _, err := r.Partition(name); api.CodeOf(err) != api.CodeNotFound {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, err := (selfResolver{}).Partition("self"); err == nil {
		t.Error("a VM of no partition has a self")
	}
}

func TestLabelFrom(t *testing.T) {
	for path, want := range map[string]string{
		"/reports": "reports", "/a/My Docs": "my-docs", "/.hidden": "hidden", "/..x": "x", "/ü": "u", "/": "files",
		"/Ünïcode": "unicode", "/a/Ärger (2024).txt": "arger-2024-.txt", "/straße": "strae", "/日本語": "fs", "/日本語2024": "2024", "/請求書のx": "fs",
		"/a:b": "a-b", "/…": "fs", "/---": "fs", "/x.": "x", "/a – b": "a-b",
		"/" + strings.Repeat("a", 47) + "-b": strings.Repeat("a", 47),
		"/" + strings.Repeat("a", 100):       strings.Repeat("a", 48),
	} {
		p, err := capabilities.ParseRelPath(path)
		if err != nil {
			t.Fatal(err)
		}
		c, err := capabilities.NewFS(workID, p, capabilities.NewRights("read"))
		if err != nil {
			t.Fatal(err)
		}
		got := labelFrom(c)
		if got != want {
			t.Errorf("%q gives %q, want %q", path, got, want)
		}
		if err := wire.CheckLabel(got); err != nil {
			t.Errorf("%q gives %q: %v", path, got, err)
		}
	}
}
