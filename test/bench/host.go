package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
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

var kinds = capabilities.NewKinds(capabilities.FS{})

func (b *bench) tokens() error {
	public, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	c, err := kinds.Parse("fs:ro:"+uuid.NewString()+":/reports/2026", nil)
	if err != nil {
		return err
	}
	signer := capabilities.NewSigner(key, "bench")
	claims := capabilities.Claims{Holder: uuid.New(), Grant: uuid.New(), IssuedAt: time.Now(), Expiry: time.Now().Add(time.Hour), Epoch: 1, Capability: c}
	token, err := signer.Mint(claims)
	if err != nil {
		return err
	}
	signature := ed25519.Sign(key, token)
	verifier := capabilities.NewVerifier("bench", 1, public)
	cache := capabilities.NewVerifyCache(kinds, verifier, 64)
	mint, sign, err := best(cpu, 15, 300, func() error { _, err := signer.Mint(claims); return err },
		func() error { ed25519.Sign(key, token); return nil })
	if err != nil {
		return err
	}
	verify, bare, err := best(cpu, 15, 300, func() error {
		p, err := kinds.ParseToken(token)
		if err == nil {
			_, err = verifier.Verify(p, time.Now())
		}
		return err
	}, func() error { ed25519.Verify(public, token, signature); return nil })
	if err != nil {
		return err
	}
	hit, _, err := best(cpu, 9, 20000, func() error { _, err := cache.Verify(token, time.Now()); return err }, func() error { return nil })
	if err != nil {
		return err
	}
	b.add(Row{What: "mint a token", Value: mint / micro, Unit: "µs", Probe: sign / micro, Of: "bare Ed25519, CPU time", Bound: ratio, Target: 1.3})
	b.add(Row{What: "verify a token", Value: verify / micro, Unit: "µs", Probe: bare / micro, Of: "bare Ed25519, CPU time", Bound: ratio, Target: 1.4})
	b.add(Row{What: "verify a token that was verified before", Value: hit / micro, Unit: "µs", Bound: absolute, Target: 1})
	return nil
}

// rules are 1,000 rules over 100 VMs.
func rules(vms []uuid.UUID) string {
	var s strings.Builder
	s.WriteString("package spectrum.grant\n")
	for i := range 1000 {
		fmt.Fprintf(&s, "\nallow if {\n\tinput.holder.vm == %q\n\tinput.capability.kind == \"fs\"\n\tinput.capability.resource.path == \"/d%d\"\n}\n", vms[i%len(vms)], i)
	}
	return s.String()
}

const hostPolicy = "package spectrum.grant\n\nallow if input.requester.kind == \"person\"\n"

var benchLine = regexp.MustCompile(`(?m)^BenchmarkDecideInWorker/evaluate\S*\s+\d+\s+([\d.]+) ns/op`)

func (b *bench) decisions() error {
	if b.policy != "" {
		least := 0.0
		for range 5 {
			cmd := exec.CommandContext(b.ctx, b.policy, "-test.run", "^$", "-test.bench", "DecideInWorker/evaluate", "-test.benchtime", "1s")
			out, err := cmd.Output()
			if err != nil {
				return fmt.Errorf("%s: %w", b.policy, err)
			}
			m := benchLine.FindSubmatch(out)
			if m == nil {
				return fmt.Errorf("%s printed no figure:\n%s", b.policy, out)
			}
			if ns, _ := strconv.ParseFloat(string(m[1]), 64); least == 0 || ns < least {
				least = ns
			}
		}
		b.add(Row{What: "one decision in the worker, 1,000 rules over 100 VMs", Value: least / micro, Unit: "µs", Bound: absolute, Target: 25})
	} else {
		fmt.Fprintln(os.Stderr, "bench: SKIP a decision inside the worker: needs -policy-test")
	}
	vms := make([]uuid.UUID, 100)
	for i := range vms {
		vms[i] = uuid.New()
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	engines := policy.NewEngines(policy.Options{Worker: []string{self, "policy-worker"}, Stretch: 10})
	defer engines.Close()
	files := map[string][]byte{"rules.rego": []byte(rules(vms))}
	if _, err := engines.Load(b.ctx, policy.HostEngine, policy.Sources{Files: files, Dir: "bench"}); err != nil {
		return err
	}
	one := func() error { return decide(b.ctx, engines, vms[42]) }
	trip, _, err := best(wall, 15, 200, one, func() error { return nil })
	if err != nil {
		return err
	}
	b.add(Row{What: "one decision, the broker's round trip to the worker", Value: trip / micro, Unit: "µs", Bound: absolute, Target: 150})
	cold, err := rested(300, one)
	if err != nil {
		return err
	}
	b.add(Row{What: "one decision, 2 ms after the last", Value: cold[0] / micro, Unit: "µs", Bound: told})
	return nil
}

// decide asks the host's engine for what rule 42 of rules allows.
func decide(ctx context.Context, engines *policy.Engines, vm uuid.UUID) error {
	in := policy.Input{
		Action: policy.ActionGrant, Now: time.Now().UTC().Truncate(time.Second), Requester: policy.Requester{Kind: policy.RequesterPerson},
		Holder:     policy.Holder{VM: vm},
		Capability: policy.Capability{Kind: "fs", Resource: []byte(`{"partition":"` + uuid.NewString() + `","path":"/d42"}`), Rights: []string{"read"}},
	}
	if v := engines.Decide(ctx, []policy.EngineID{policy.HostEngine}, func(policy.EngineID) policy.Input { return in }, false); v.Outcome != policy.Allow {
		return fmt.Errorf("the decision is %s: %s", v.Outcome, v.Summary())
	}
	return nil
}

// scratch is a directory on the file system where the broker's state would be.
func scratch() (dir string, remove func(), err error) {
	dir, err = os.MkdirTemp("", "bench-")
	return dir, func() { _ = os.RemoveAll(dir) }, err
}

func openLedger(ctx context.Context, dir string) (*ledger.Ledger, error) {
	return ledger.Open(ctx, ledger.Options{Dir: dir, Kinds: kinds, Clock: clock.System{}})
}

func (b *bench) ledger() error {
	dir, remove, err := scratch()
	if err != nil {
		return err
	}
	defer remove()
	l, err := openLedger(b.ctx, dir+"/state")
	if err != nil {
		return err
	}
	defer l.Close()
	probe, err := newAppender(dir)
	if err != nil {
		return err
	}
	defer probe.close()
	page, err := newAppender(dir)
	if err != nil {
		return err
	}
	defer page.close()
	commit := func() error {
		_, err := l.Update(b.ctx, func(tx *ledger.Tx) error {
			return tx.Append(ledger.Event{Type: ledger.BrokerStarted, Actor: ledger.Actor{Kind: ledger.ActorBroker}})
		})
		return err
	}
	one, sync1, err := best(wall, 9, 100, commit, probe.once)
	if err != nil {
		return err
	}
	b.add(Row{What: "one durable commit", Value: one / micro, Unit: "µs", Probe: sync1 / micro, Of: "append + fdatasync", Bound: ratio, Target: 1.2})
	sync2, _, err := best(wall, 9, 100, page.page, probe.once)
	if err != nil {
		return err
	}
	b.add(Row{What: "append and fdatasync of what a commit writes, a page and its header", Value: sync2 / micro, Unit: "µs", Bound: told})
	cold, err := rested(300, commit, probe.once)
	if err != nil {
		return err
	}
	b.add(Row{What: "one durable commit, 2 ms after the last", Value: cold[0] / micro, Unit: "µs", Bound: told})
	b.add(Row{What: "append and fdatasync, 2 ms after the last", Value: cold[1] / micro, Unit: "µs", Bound: told})
	const writers, each = 64, 60
	shared, single, err := best(wall, 5, 1, func() error {
		var wg sync.WaitGroup
		errs := make(chan error, writers)
		for range writers {
			wg.Go(func() {
				for range each {
					if err := commit(); err != nil {
						errs <- err
						return
					}
				}
			})
		}
		wg.Wait()
		select {
		case err := <-errs:
			return err
		default:
			return nil
		}
	}, func() error {
		for range 200 {
			if err := commit(); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	second := float64(time.Second)
	b.add(Row{
		What: "durable commits with 64 writers", Value: writers * each / (shared / second), Unit: "/s",
		Probe: 200 / (single / second), Of: "a single writer", Bound: atLeast, Target: 10,
	})
	return nil
}

// overTheSocket measures a whole grant less applying: the VM does not run, so
// that the grant, which persists, waits.
func (b *bench) overTheSocket() error {
	if err := b.tools.Missing(); err != nil {
		fmt.Fprintln(os.Stderr, "bench: SKIP a grant over the socket, and the broker's memory:", err)
		return nil
	}
	dir, remove, err := scratch()
	if err != nil {
		return err
	}
	defer remove()
	d, err := harness.New(b.tools, dir)
	if err != nil {
		return err
	}
	defer d.Close()
	vms := make([]uuid.UUID, 100)
	files := map[string]string{}
	for i := range vms {
		files[fmt.Sprintf("d%d/x", i)] = "x"
	}
	p, err := d.AddPartition(files, nil)
	if err != nil {
		return err
	}
	for i := range vms {
		if vms[i], err = d.AddVM(p, fmt.Sprintf("vm%d", i), ""); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(p.Dir, "svc/policy/rules.rego"), []byte(rules(vms)), 0o644); err != nil {
		return err
	}
	if err := d.HostPolicy("host.rego", hostPolicy); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(b.ctx, d.Stretched(60*time.Second))
	defer cancel()
	if err := d.StartBroker(ctx); err != nil {
		return err
	}
	probe, err := newAppender(dir)
	if err != nil {
		return err
	}
	defer probe.close()
	before, err := cpuOf(d.BrokerPID())
	if err != nil {
		return err
	}
	// Each VM in turn, so that none comes to hold more than a VM would.
	n := 0
	whole, sync1, err := best(wall, 20, 50, func() error {
		i := n % len(vms)
		n++
		_, err := d.Client.Grant(b.ctx, api.GrantRequest{VM: vms[i].String(), Capability: fmt.Sprintf("fs:ro:%s:/d%d", p.ID, i), Persist: true})
		return err
	}, probe.once)
	if err != nil {
		return err
	}
	b.add(Row{What: "a whole grant less applying, over the socket", Value: whole / micro, Unit: "µs", Probe: sync1 / micro, Of: "append + fdatasync", Bound: difference, Target: 400})
	after, err := cpuOf(d.BrokerPID())
	if err != nil {
		return err
	}
	b.add(Row{What: "CPU time of the broker for it, with what follows the answer", Value: float64(after-before) / float64(n) / micro, Unit: "µs", Bound: told})
	mb, err := memory(d.BrokerPID(), "Pss")
	if err != nil {
		return err
	}
	b.add(Row{What: fmt.Sprintf("memory of the broker, 100 VMs and 1,000 rules, after %d grants", n), Value: mb, Unit: "MB", Bound: absolute, Target: 40})
	status, err := d.Client.PolicyStatus(ctx)
	if err != nil {
		return err
	}
	most := 0.0
	for _, e := range status.Engines {
		if e.PID == 0 {
			continue
		}
		if mb, err = memory(e.PID, "Pss"); err != nil {
			return err
		}
		most = max(most, mb)
	}
	b.add(Row{What: "memory of the largest policy worker, 1,000 rules", Value: most, Unit: "MB", Bound: absolute, Target: 25})
	return d.StopBroker(syscall.SIGTERM)
}

func (b *bench) largeLedger() error {
	dir, remove, err := scratch()
	if err != nil {
		return err
	}
	defer remove()
	l, err := openLedger(b.ctx, dir)
	if err != nil {
		return err
	}
	const subtree, batch = 100_000, 5_000
	root := uuid.New()
	c, err := kinds.Parse("fs:ro:"+uuid.NewString()+":/reports", nil)
	if err != nil {
		return err
	}
	holder, partition := uuid.New(), uuid.New()
	for made := 0; made < b.big; {
		_, err := l.Update(b.ctx, func(tx *ledger.Tx) error {
			for range min(batch, b.big-made) {
				id, parent := uuid.New(), root
				if made == 0 {
					id, parent = root, uuid.Nil
				} else if made > subtree {
					parent = uuid.Nil
				}
				if err := tx.Append(ledger.NewGrant(ledger.Actor{Kind: ledger.ActorBroker}, id, holder, partition, ledger.GrantRecord{Capability: c, Parent: parent, Label: "reports"})); err != nil {
					return err
				}
				made++
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	var child uuid.UUID
	l.View(func(s *ledger.State) { child = s.Subtree(root)[0] })
	began := time.Now()
	_, err = l.Update(b.ctx, func(tx *ledger.Tx) error {
		return tx.Append(ledger.NewChange(ledger.GrantRevoking, ledger.Actor{Kind: ledger.ActorBroker}, root, ledger.Change{}))
	})
	if err != nil {
		return err
	}
	dead := false
	l.View(func(s *ledger.State) { dead = s.Live(child, clock.System{}.Now()) != nil })
	took := time.Since(began)
	if !dead {
		return fmt.Errorf("a child of a revoked grant is alive")
	}
	b.add(Row{What: fmt.Sprintf("revoke a subtree of %d tokens (one row, refused from then on)", min(subtree, b.big-1)), Value: took.Seconds() * 1e3, Unit: "ms", Bound: absolute, Target: 10})
	if err := l.Close(); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	var least opened
	for i := range 3 {
		out, err := exec.CommandContext(b.ctx, self, "open-ledger", dir).Output()
		if err != nil {
			return fmt.Errorf("cannot open the ledger again: %w", err)
		}
		var o opened
		if err := json.Unmarshal(out, &o); err != nil {
			return err
		}
		if i == 0 {
			least = o
		}
		least = opened{min(least.Seconds, o.Seconds), max(least.Peak, o.Peak)}
	}
	b.add(Row{What: fmt.Sprintf("open a ledger of %d tokens, chain verified", b.big), Value: least.Seconds, Unit: "s", Bound: absolute, Target: 3})
	b.add(Row{What: fmt.Sprintf("peak memory of the process that opened %d tokens", b.big), Value: least.Peak, Unit: "MB", Bound: absolute, Target: 300})
	return nil
}

// opened is what a process of its own tells of opening a ledger: this one's
// memory is full of making it.
type opened struct{ Seconds, Peak float64 }

func openLedgerMain(dir string) int {
	began := time.Now()
	l, err := openLedger(context.Background(), dir)
	if err == nil {
		o := opened{Seconds: time.Since(began).Seconds()}
		if o.Peak, err = kilobytes("/proc/self/status", "VmHWM"); err == nil {
			err = errors.Join(l.Close(), json.NewEncoder(os.Stdout).Encode(o))
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}
