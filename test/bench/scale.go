package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/policy"
	"spectrum-os.org/broker/test/harness"
)

// series is one line of a picture: a figure at each number of tokens.
type series struct {
	picture string // file name
	what    string
	unit    string
	at      map[int]float64
}

// scaling is what is measured as the number of live tokens grows.
type scaling struct {
	tokens []int
	lines  []*series
}

// note keeps one figure.
func (s *scaling) note(picture, what, unit string, tokens int, value float64) {
	for _, l := range s.lines {
		if l.what == what {
			l.at[tokens] = value
			return
		}
	}
	s.lines = append(s.lines, &series{picture, what, unit, map[int]float64{tokens: value}})
}

// The pictures, and what their vertical axes have in common.
const (
	answers = "answers" // what somebody waits for: microseconds
	wholes  = "wholes"  // what is done to all of it: milliseconds
	sizes   = "sizes"   // megabytes
)

// scale measures at each number of tokens, in a desktop made for it.
func (b *bench) scale(tokens []int) (*scaling, error) {
	if err := b.tools.Missing(); err != nil {
		return nil, err
	}
	s := &scaling{tokens: tokens}
	for _, n := range tokens {
		fmt.Fprintf(os.Stderr, "bench: %d tokens …\n", n)
		if err := b.scaleAt(s, n); err != nil {
			return nil, fmt.Errorf("at %d tokens: %w", n, err)
		}
	}
	return s, nil
}

// world is a desktop of 200 VMs: half of them hold all the tokens, evenly, and the
// others hold what is granted while it is measured.
type world struct {
	d         *harness.Desktop
	partition harness.Partition
	holders   []uuid.UUID
	others    []uuid.UUID
	root      uuid.UUID   // half of the tokens derive from it, ten from each
	ids       []uuid.UUID // some of them
}

func (b *bench) scaleAt(s *scaling, n int) error {
	dir, remove, err := scratch()
	if err != nil {
		return err
	}
	defer remove()
	w, err := b.newWorld(dir, n)
	if err != nil {
		return err
	}
	defer w.d.Close()
	if err := b.inMemory(s, w, n); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(b.ctx, self, "open-ledger", w.d.StateDir()).Output()
	if err != nil {
		return fmt.Errorf("cannot open the ledger again: %w", err)
	}
	var o opened
	if err := json.Unmarshal(out, &o); err != nil {
		return err
	}
	s.note(wholes, "open the ledger, chain verified", "ms", n, o.Seconds*1e3)
	s.note(sizes, "peak memory of opening it", "MB", n, o.Peak)
	info, err := os.Stat(filepath.Join(w.d.StateDir(), "ledger.db"))
	if err != nil {
		return err
	}
	s.note(sizes, "the ledger on disk", "MB", n, float64(info.Size())/1e6)
	if n > b.brokerMost {
		return nil
	}
	return b.inBroker(s, w, n)
}

func (b *bench) newWorld(dir string, n int) (*world, error) {
	d, err := harness.New(b.tools, dir)
	if err != nil {
		return nil, err
	}
	d.BrokerArgs = []string{"--max-grants=1000000"}
	w := &world{d: d}
	files := map[string]string{}
	for i := range 100 {
		files[fmt.Sprintf("d%d/x", i)] = "x"
	}
	if w.partition, err = d.AddPartition(files, nil); err != nil {
		return nil, err
	}
	for i := range 200 {
		vm, err := d.AddVM(w.partition, fmt.Sprintf("vm%d", i), "")
		if err != nil {
			return nil, err
		}
		if i < 100 {
			w.holders = append(w.holders, vm)
		} else {
			w.others = append(w.others, vm)
		}
	}
	if err := os.WriteFile(filepath.Join(w.partition.Dir, "svc/policy/rules.rego"), []byte(rules(w.others)), 0o644); err != nil {
		return nil, err
	}
	if err := d.HostPolicy("host.rego", hostPolicy); err != nil {
		return nil, err
	}
	// A broker binds the VMs to their partition.
	ctx, cancel := context.WithTimeout(b.ctx, d.Stretched(60*time.Second))
	defer cancel()
	if err := d.StartBroker(ctx); err != nil {
		return nil, err
	}
	if err := d.StopBroker(syscall.SIGTERM); err != nil {
		return nil, err
	}
	return w, w.fill(b.ctx, n)
}

// fill makes n live tokens.
func (w *world) fill(ctx context.Context, n int) error {
	l, err := openLedger(ctx, w.d.StateDir())
	if err != nil {
		return err
	}
	defer l.Close()
	var all []capabilities.Capability
	for i := range 100 {
		c, err := kinds.Parse(fmt.Sprintf("fs:ro:%s:/d%d", w.partition.ID, i), nil)
		if err != nil {
			return err
		}
		all = append(all, c)
	}
	tree := make([]uuid.UUID, 0, n/2+1)
	const batch = 5000
	for made := 0; made < n; {
		_, err := l.Update(ctx, func(tx *ledger.Tx) error {
			for range min(batch, n-made) {
				id, parent, c := uuid.New(), uuid.Nil, all[made%100]
				if made <= n/2 {
					c = all[0]
					if made > 0 {
						parent = tree[(made-1)/10]
					}
					tree = append(tree, id)
				}
				err := tx.Append(ledger.NewGrant(ledger.Actor{Kind: ledger.ActorBroker}, id, w.holders[made%100], w.partition.ID, ledger.GrantRecord{
					Capability: c, Parent: parent, Label: fmt.Sprintf("d%d-%d", made%100, made/100), Persist: true,
				}))
				if err != nil {
					return err
				}
				if made%(n/1000) == 0 {
					w.ids = append(w.ids, id)
				}
				made++
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	w.root = tree[0]
	return nil
}

// inMemory measures the parts of a broker in this process, beside the ledger.
func (b *bench) inMemory(s *scaling, w *world, n int) error {
	l, err := openLedger(b.ctx, w.d.StateDir())
	if err != nil {
		return err
	}
	defer l.Close()
	probe, err := newAppender(w.d.Dir)
	if err != nil {
		return err
	}
	defer probe.close()
	c, err := kinds.Parse(fmt.Sprintf("fs:ro:%s:/d1", w.partition.ID), nil)
	if err != nil {
		return err
	}
	one, bare, err := best(wall, 15, 30, func() error {
		_, err := l.Update(b.ctx, func(tx *ledger.Tx) error {
			return tx.Append(ledger.NewGrant(ledger.Actor{Kind: ledger.ActorBroker}, uuid.New(), w.others[99], w.partition.ID,
				ledger.GrantRecord{Capability: c, Label: "x", Persist: true}))
		})
		return err
	}, probe.once)
	if err != nil {
		return err
	}
	s.note(answers, "append + fdatasync (the probe)", "µs", n, bare/micro)
	s.note(answers, "one durable commit", "µs", n, one/micro)
	now := clock.System{}.Now()
	live, _, err := best(cpu, 9, 2000, func() error {
		var err error
		l.View(func(s *ledger.State) { err = s.Live(w.ids[rand.IntN(len(w.ids))], now) })
		return err
	}, func() error { return nil })
	if err != nil {
		return err
	}
	s.note(answers, "is a token live, with its ancestors", "µs", n, live/micro)
	return b.signing(s, w, n)
}

// signing measures tokens and a decision, in the same process.
func (b *bench) signing(s *scaling, w *world, n int) error {
	public, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	c, err := kinds.Parse(fmt.Sprintf("fs:ro:%s:/d1", w.partition.ID), nil)
	if err != nil {
		return err
	}
	signer, verifier := capabilities.NewSigner(key, "bench"), capabilities.NewVerifier("bench", 1, public)
	claims := capabilities.Claims{Holder: uuid.New(), Grant: uuid.New(), IssuedAt: time.Now(), Expiry: time.Now().Add(time.Hour), Epoch: 1, Capability: c}
	token, err := signer.Mint(claims)
	if err != nil {
		return err
	}
	mint, verify, err := best(cpu, 9, 200, func() error { _, err := signer.Mint(claims); return err }, func() error {
		p, err := kinds.ParseToken(token)
		if err == nil {
			_, err = verifier.Verify(p, time.Now())
		}
		return err
	})
	if err != nil {
		return err
	}
	s.note(answers, "mint a token", "µs", n, mint/micro)
	s.note(answers, "verify a token", "µs", n, verify/micro)
	self, err := os.Executable()
	if err != nil {
		return err
	}
	engines := policy.NewEngines(policy.Options{Worker: []string{self, "policy-worker"}, Stretch: 10})
	defer engines.Close()
	sources := policy.Sources{Files: map[string][]byte{"rules.rego": []byte(rules(w.others))}, Dir: "bench"}
	if _, err := engines.Load(b.ctx, policy.HostEngine, sources); err != nil {
		return err
	}
	trip, _, err := best(wall, 15, 60, func() error { return decide(b.ctx, engines, w.others[42]) }, func() error { return nil })
	s.note(answers, "one decision, round trip to the worker", "µs", n, trip/micro)
	return err
}

// inBroker measures a whole broker that starts with the tokens.
func (b *bench) inBroker(s *scaling, w *world, n int) error {
	ctx, cancel := context.WithTimeout(b.ctx, w.d.Stretched(120*time.Second))
	defer cancel()
	began := time.Now()
	if err := w.d.StartBroker(ctx); err != nil {
		return err
	}
	s.note(wholes, "restart the broker, until it is ready", "ms", n, time.Since(began).Seconds()*1e3)
	i := 0
	var granted []uuid.UUID
	grant, _, err := best(wall, 10, 20, func() error {
		k := i % len(w.others)
		i++
		g, err := w.d.Client.Grant(b.ctx, api.GrantRequest{VM: w.others[k].String(), Capability: fmt.Sprintf("fs:ro:%s:/d%d", w.partition.ID, k), Persist: true})
		granted = append(granted, g.ID)
		return err
	}, func() error { return nil })
	if err != nil {
		return err
	}
	s.note(answers, "a whole grant less applying, over the socket", "µs", n, grant/micro)
	show, _, err := best(wall, 5, 20, func() error {
		_, err := w.d.Client.ShowGrant(b.ctx, granted[0].String())
		return err
	}, func() error { return nil })
	if err != nil {
		return err
	}
	s.note(answers, "show a grant, over the socket", "µs", n, show/micro)
	list, _, err := best(wall, 5, 10, func() error {
		_, err := w.d.Client.ListGrants(b.ctx, api.GrantFilter{VM: w.others[0].String()})
		return err
	}, func() error { return nil })
	if err != nil {
		return err
	}
	s.note(answers, "list the grants of a VM that holds few, over the socket", "µs", n, list/micro)
	revoke := func(id uuid.UUID) error {
		_, err := w.d.Client.Revoke(b.ctx, api.RevokeRequest{IDs: []string{id.String()}})
		return err
	}
	i = 0
	single, _, err := best(wall, 5, 10, func() error { i++; return revoke(granted[i-1]) }, func() error { return nil })
	if err != nil {
		return err
	}
	s.note(answers, "revoke one grant, over the socket", "µs", n, single/micro)
	if err := b.notePSS(s, w, n); err != nil {
		return err
	}
	began = time.Now()
	if err := revoke(w.root); err != nil {
		return err
	}
	s.note(wholes, "revoke a grant that half of them derive from, over the socket", "ms", n, time.Since(began).Seconds()*1e3)
	// What follows from it, in a world where no VM runs, is nobody's to wait for here.
	return w.d.StopBroker(syscall.SIGKILL)
}

func (b *bench) notePSS(s *scaling, w *world, n int) error {
	mb, err := memory(w.d.BrokerPID(), "Pss")
	if err == nil {
		s.note(sizes, "memory of the broker", "MB", n, mb)
	}
	return err
}
