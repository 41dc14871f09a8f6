package applyfs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"spectrum-os.org/broker/agents/wire"
)

// mountTime is how long agents may take to mount. It is no multiple of the pause
// between two tries, so that no two timers ever end together.
const mountTime = 9900 * time.Millisecond

// slowAgent never answers.
type slowAgent struct{}

func (slowAgent) Mount(ctx context.Context, _ wire.MountRequest) (wire.MountReply, error) {
	<-ctx.Done()
	return wire.MountReply{}, ctx.Err()
}

func (slowAgent) Unmount(context.Context, string) error { return nil }

// saying is a real client of an agent that answers everything with raw.
func saying(raw string) Agent {
	return wire.NewClient(func(context.Context) (net.Conn, error) {
		here, there := net.Pipe()
		go func() {
			defer there.Close()
			if r, err := http.ReadRequest(bufio.NewReader(there)); err == nil {
				_, _ = io.Copy(io.Discard, r.Body)
			}
			_, _ = io.WriteString(there, raw)
		}()
		return here, nil
	})
}

func reply(status int, body string) string {
	return fmt.Sprintf("HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s", status, len(body), body)
}

func many(n int, err error) []error {
	out := make([]error, n)
	for i := range out {
		out[i] = err
	}
	return out
}

// What an agent does, or whether there is one, costs the share nothing. Time is
// the bubble's, so that it can be told exactly.
func TestAgents(t *testing.T) {
	unreachable := fmt.Errorf("%w: the connection ended early", wire.ErrUnreachable)
	busy := &wire.AgentError{Status: 503, Code: wire.CodeBusy, Message: "later"}
	for name, c := range map[string]struct {
		agent   Agent
		noAgent error
		// note is exact, or, where it ends in …, how it begins.
		note string
		// asked is how often the agent is, where it is a goodAgent; took is how
		// long that all takes.
		asked int
		took  time.Duration
	}{
		"good":                  {agent: &goodAgent{}, asked: 1},
		"none":                  {noAgent: wire.ErrUnreachable, note: NoAgent},
		"VM ended":              {noAgent: errors.New("the VM ended"), note: NoAgent},
		"lost once":             {agent: &goodAgent{fails: many(1, unreachable)}, asked: 2, took: 250 * time.Millisecond},
		"lost often":            {agent: &goodAgent{fails: many(4, unreachable)}, asked: 5, took: time.Second},
		"lost":                  {agent: &goodAgent{fails: many(99, unreachable)}, note: NoAgent, asked: 5, took: time.Second},
		"busy for a while":      {agent: &goodAgent{fails: many(8, busy)}, asked: 9, took: 2 * time.Second},
		"busy for ever":         {agent: &goodAgent{fails: many(9999, busy)}, note: "attached, but the guest's agent could not mount it: the guest's agent refused (busy): later", asked: 48, took: mountTime + 2*time.Second},
		"slow":                  {agent: slowAgent{}, note: "attached, but the guest's agent did not mount it in time", took: mountTime + 2*time.Second},
		"refuses":               {agent: saying(reply(409, `{"code":"conflict","message":"in use"}`)), note: "attached, but the guest's agent could not mount it: the guest's agent refused (conflict): in use"},
		"device never came":     {agent: saying(reply(504, `{"code":"timeout","message":"no device"}`)), note: "attached, but the guest's agent could not mount it: the guest's agent refused (timeout): no device"},
		"mounts elsewhere":      {agent: saying(reply(200, `{"path":"/etc"}`)), note: "attached, but the guest's agent could not mount it: " + wire.ErrProtocol.Error() + ": it mounted somewhere else"},
		"rubbish":               {agent: saying("SSH-2.0-hello\r\n\r\n"), note: "attached, but the guest's agent could not mount it: " + wire.ErrProtocol.Error() + ": …"},
		"unknown field":         {agent: saying(reply(200, `{"path":"/x","token":1}`)), note: "attached, but the guest's agent could not mount it: " + wire.ErrProtocol.Error() + ": …"},
		"too much":              {agent: saying(reply(200, strings.Repeat(" ", 1<<20))), note: "attached, but the guest's agent could not mount it: " + wire.ErrProtocol.Error() + ": …"},
		"hangs up":              {agent: saying(""), note: NoAgent, took: time.Second},
		"speaks to terminals":   {agent: saying(reply(500, `{"code":"failed","message":"\u001b[2J\u0007`+strings.Repeat("x", 4000)+`"}`)), note: "attached, but the guest's agent could not mount it: the guest's agent refused (failed): …"},
		"lies about its errors": {agent: saying(reply(500, `{"code":"not_running","message":"x"}`)), note: "attached, but the guest's agent could not mount it: " + wire.ErrProtocol.Error() + ": …"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				s := w.fake()
				s.attaching = 0
				w.agent, w.noAgent = c.agent, c.noAgent
				o := w.object("docs", 1, w.capability("/docs", "read"))
				begun := time.Now()
				note, err := w.apply(o)
				if err != nil {
					t.Fatalf("the share fails because of the agent: %v", err)
				}
				begin, open := strings.CutSuffix(c.note, "…")
				if open && (!strings.HasPrefix(note, begin) || len(note) > len(begin)+250) || !open && note != c.note {
					t.Errorf("note %q, want %q", note, c.note)
				}
				if strings.ContainsFunc(note, func(r rune) bool { return r < ' ' || r == 0x7f }) {
					t.Errorf("note %q can speak to a terminal", note)
				}
				if took := time.Since(begun); took != c.took {
					t.Errorf("it took %v, want %v", took, c.took)
				}
				if a, ok := c.agent.(*goodAgent); ok && len(a.seen()) != c.asked {
					t.Errorf("the agent was asked %d times, want %d", len(a.seen()), c.asked)
				}
				if _, _, ok := s.put(o.ID); !ok {
					t.Error("the share is not there")
				}
				if held := w.held(); len(held) != 0 {
					t.Errorf("still open here: %v", held)
				}
			})
		})
	}
}

// An agent that hangs does not keep an application from ending with its caller.
func TestCallerLeavesASlowAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		s := w.fake()
		w.agent = slowAgent{}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		begun := time.Now()
		o := w.object("docs", 1, w.capability("/docs", "read"))
		if note, err := New(w, mountTime).Apply(ctx, o); err != nil || note == "" {
			t.Errorf("note %q, error %v; want a note, and the share", note, err)
		}
		if took := time.Since(begun); took != time.Second {
			t.Errorf("it took %v", took)
		}
		if _, _, ok := s.put(o.ID); !ok {
			t.Error("the share is not there")
		}
	})
}

// An agent that comes back is told what it was told before, and nothing of what is
// not attached.
func TestAgentBack(t *testing.T) {
	w := newWorld(t)
	w.fake()
	for _, path := range []string{"/docs", "/docs/one"} {
		a := &goodAgent{}
		w.agent = a
		o := w.object("docs", 1, w.capability(path, "read"))
		o.ID = w.object(path, 1, o.Capability).ID
		if _, err := w.apply(o); err != nil {
			t.Fatal(err)
		}
		if err := New(w, mountTime).AgentBack(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		if seen := a.seen(); len(seen) != 2 || seen[0] != seen[1] {
			t.Errorf("%s: the agent was told %+v", path, seen)
		}
		w.noneHeld()
	}
	never := w.object("never", 1, w.capability("/docs", "read"))
	if err := New(w, mountTime).AgentBack(t.Context(), never); err == nil || !strings.Contains(err.Error(), "is not attached") {
		t.Errorf("what was never shared: %v", err)
	}
	w.noAgent = wire.ErrUnreachable
	err := New(w, mountTime).AgentBack(t.Context(), w.object("/docs", 1, w.capability("/docs", "read")))
	if err == nil || err.Error() != NoAgent {
		t.Errorf("error %v, want %q", err, NoAgent)
	}
}
