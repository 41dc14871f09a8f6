package disks

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/test/powercut"
)

// model is what clients were told. What was asked and not answered may be
// either.
type model struct {
	mu      sync.Mutex
	granted map[string]bool // label
	ending  map[string]bool // its revocation was asked for
	revoked map[string]bool
	named   string   // acknowledged
	asked   []string // since then, and not
	tokens  map[string]string
}

// wrong holds the broker against it.
func (m *model) wrong(grants map[string]api.Grant, name string, token func(api.Grant) string) error {
	for label := range m.granted {
		g, there := grants[label]
		live := g.State == api.GrantPending || g.State == api.GrantActive
		switch {
		case !there:
			return fmt.Errorf("grant %s was acknowledged and is lost", label)
		case m.revoked[label] && live:
			return fmt.Errorf("grant %s was revoked and is %s", label, g.State)
		case !m.ending[label] && !live:
			return fmt.Errorf("grant %s was acknowledged, nobody took it back, and it is %s", label, g.State)
		case m.tokens[label] != "" && live && token(g) != m.tokens[label]:
			return fmt.Errorf("the token of grant %s is another one: the key is not the one that was", label)
		}
	}
	if name != m.named && !slices.Contains(m.asked, name) {
		return fmt.Errorf("the partition was named %q, and then perhaps %q, and is %q", m.named, m.asked, name)
	}
	return nil
}

// cutter cuts the power of a broker, again and again.
type cutter struct {
	*world
	model
	naming sync.Mutex
}

func newCutter(t *testing.T) *cutter {
	c := &cutter{world: newWorld(t)}
	c.granted, c.ending, c.revoked, c.tokens = map[string]bool{}, map[string]bool{}, map[string]bool{}, map[string]string{}
	return c
}

// client does one thing after another until it gets no answer.
func (c *cutter) client(ctx context.Context, r *rand.Rand) {
	var mine []api.Grant
	for ctx.Err() == nil {
		var err error
		switch n := r.IntN(10); {
		case n < 2:
			err = c.rename(ctx)
		case n < 6 && len(mine) > 0:
			g := mine[len(mine)-1]
			mine = mine[:len(mine)-1]
			err = c.takeBack(ctx, g)
		default:
			var g api.Grant
			if g, err = c.give(ctx); err == nil {
				mine = append(mine, g)
			}
		}
		if err != nil {
			c.refused(err)
			return
		}
	}
}

// refused fails where a broker that has power refuses what it should not.
func (c *cutter) refused(err error) {
	select {
	case <-c.disk.Off():
	default:
		c.t.Errorf("with the power on: %v", err)
		c.disk.PowerOff()
	}
}

// whileOn is a context that ends with the power: who waits for a broker then
// waits for ever.
func (c *cutter) whileOn(most time.Duration) context.Context {
	ctx, cancel := context.WithCancel(c.ctx(most))
	off := c.disk.Off()
	go func() {
		defer cancel()
		select {
		case <-off:
		case <-ctx.Done():
		}
	}()
	return ctx
}

func (c *cutter) give(ctx context.Context) (api.Grant, error) {
	label, g, err := c.ask(ctx, true)
	if err != nil {
		return g, err
	}
	c.mu.Lock()
	c.granted[label] = true
	c.mu.Unlock()
	t, err := c.Client.Token(ctx, g.ID.String())
	if err == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.tokens[label] = t.Token
	}
	return g, err
}

func (c *cutter) takeBack(ctx context.Context, g api.Grant) error {
	c.mu.Lock()
	c.ending[g.Label] = true
	c.mu.Unlock()
	_, err := c.Client.Revoke(ctx, api.RevokeRequest{IDs: []string{g.ID.String()}})
	if err == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.revoked[g.Label] = true
	}
	return err
}

// rename gives the partition a petname. One at a time, so that the last one that
// was acknowledged is the one that counts.
func (c *cutter) rename(ctx context.Context) error {
	name := fmt.Sprintf("n%d", c.labels.Add(1))
	c.naming.Lock()
	defer c.naming.Unlock()
	c.mu.Lock()
	c.asked = append(c.asked, name)
	c.mu.Unlock()
	_, err := c.Client.SetName(ctx, name, c.part.ID)
	if err == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.named, c.asked = name, nil
	}
	return err
}

// live has a broker live until the power goes, and says what was wrong when it
// began.
func (c *cutter) live(r *rand.Rand) error {
	c.disk.StopAt(1 + r.IntN(500))
	started := make(chan error, 1)
	go func() { started <- c.start() }()
	var err error
	select {
	case <-c.disk.Off(): // while it starts
		c.eventually("a broker to kill", func() error {
			if c.BrokerPID() == 0 {
				return errors.New("there is none")
			}
			return nil
		})
		c.unplug()
		if err := <-started; err != nil {
			c.t.Logf("without power: %v", err)
		}
		return nil
	case err = <-started:
	}
	if err == nil {
		err = c.compare()
	}
	select {
	case <-c.disk.Off():
		err = nil // whatever it could not do, it could not do without power
	default:
	}
	if err == nil {
		c.loose(r)
	}
	c.unplug()
	return err
}

// loose lets clients loose until the power is off.
func (c *cutter) loose(r *rand.Rand) {
	ctx, cancel := context.WithCancel(c.ctx(time.Minute))
	defer cancel()
	var clients sync.WaitGroup
	for range 4 {
		own := choices(r.Uint64())
		clients.Go(func() { c.client(ctx, own) })
	}
	select {
	case <-c.disk.Off():
	case <-ctx.Done():
		c.t.Errorf("the clients do not come to the change at which the power goes: %s", c.disk.Recent())
	}
	// Those who wait for an answer get none, as their broker is killed.
	c.mount.Disk.PowerOff()
	c.killBroker()
	cancel()
	clients.Wait()
}

// compare holds what a broker says against what was acknowledged.
func (c *cutter) compare() error {
	ctx := c.whileOn(20 * time.Second)
	grants, err := c.grants(ctx)
	if err != nil {
		return err
	}
	names, err := c.Client.ListNames(ctx)
	if err != nil {
		return err
	}
	name := ""
	for _, n := range names {
		if n.Partition == c.part.ID {
			name = n.Name
		}
	}
	err = c.wrong(grants, name, func(g api.Grant) string {
		t, tokenErr := c.Client.Token(ctx, g.ID.String())
		if tokenErr != nil {
			return tokenErr.Error()
		}
		return t.Token
	})
	if err != nil {
		return err
	}
	// From here on what is on record is what counts.
	c.mu.Lock()
	defer c.mu.Unlock()
	c.named, c.asked = name, nil
	return c.forget(ctx, grants)
}

// forget has few grants live: each VM may hold so many only.
func (c *cutter) forget(ctx context.Context, grants map[string]api.Grant) error {
	var ids []string
	for label, g := range grants {
		if g.State == api.GrantPending || g.State == api.GrantActive {
			c.ending[label] = true
			ids = append(ids, g.ID.String())
		}
	}
	if len(ids) < 60 {
		for label, g := range grants {
			c.ending[label] = c.revoked[label] || g.State != api.GrantPending && g.State != api.GrantActive
		}
		return nil
	}
	_, err := c.Client.Revoke(ctx, api.RevokeRequest{IDs: ids})
	if err == nil {
		for label := range grants {
			c.revoked[label] = true
		}
	}
	return err
}

// powerCuts has a broker live through power cuts, each with one of many
// outcomes, and returns what was wrong first.
func powerCuts(t *testing.T, seed uint64, cuts int) error {
	c := newCutter(t)
	r := choices(seed)
	for cut := range cuts {
		if err := c.live(r); err != nil {
			return fmt.Errorf("after %d power cuts: %w", cut, err)
		}
		loss := powercut.Losses[r.IntN(len(powercut.Losses))]
		last := c.disk.Recent()
		c.disk = c.disk.Cut(r, loss)
		if slices.Contains(c.disk.Names("state"), "ledger.db") {
			if err := c.verify(); err != nil {
				return fmt.Errorf("after %d power cuts, of which the last one was such that %s (%s): %w", cut+1, loss, last, err)
			}
		}
		c.plug()
	}
	// A last life, for what the last cut left.
	if err := c.start(); err != nil {
		return fmt.Errorf("it does not start by itself: %w", err)
	}
	return c.compare()
}

// TestPowerCut cuts a broker's power at random changes: nothing acknowledged is
// lost, nothing revoked alive, the key is the same, and it starts by itself.
func TestPowerCut(t *testing.T) {
	if err := powerCuts(t, seed, cuts); err != nil {
		t.Fatalf("%v\nagain with -seed %d -cuts %d", err, seed, cuts)
	}
	t.Logf("%d power cuts, seed %d", cuts, seed)
}

// lost are the ways in which what was acknowledged is missed.
var lost = []string{
	"is lost", "was revoked and is", "nobody took it back", "was named",
	"chain is broken", "is not the one that was there", "malformed",
}

// TestPowerCutIsNoticed turns down what the promise rests on, and wants that to
// be found out within 12 cuts, by what was lost. It takes a broker that was built
// with the tag failpoints: no other can be turned down.
func TestPowerCutIsNoticed(t *testing.T) {
	for _, synchronous := range []string{"OFF", "NORMAL"} {
		t.Run(synchronous, func(t *testing.T) {
			t.Setenv("SPECTRUM_LEDGER_SYNCHRONOUS", synchronous)
			err := powerCuts(t, 3, 12)
			switch {
			case err == nil:
				t.Error("nothing was lost in 12 power cuts: was the broker built with -tags failpoints?")
			case !slices.ContainsFunc(lost, func(what string) bool { return strings.Contains(err.Error(), what) }):
				t.Errorf("found out by %v, want it by what was lost", err)
			}
		})
	}
}
