package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker/api"
)

// followFlags say whether to go on with what happens next, and how.
type followFlags struct {
	on       bool
	patience time.Duration // with a broker that is gone; negative: without end
}

func (f *followFlags) register(cmd *cobra.Command) {
	cmd.Flags().BoolVarP(&f.on, "follow", "f", false, "go on with what happens next, until interrupted")
	cmd.Flags().DurationVar(&f.patience, "reconnect-for", -1, "give up when the broker is gone for so `long`; 0s: at once; without it, never")
	cmd.Flags().Lookup("reconnect-for").DefValue = ""
	_ = cmd.RegisterFlagCompletionFunc("reconnect-for", cobra.NoFileCompletions)
}

func (a *app) eventsCommand() *cobra.Command {
	var (
		flags  eventFlags
		follow followFlags
	)
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Stream events, for programs that react to them",
		Long: `Stream events, for programs that react to them. Each has a number; --after goes
on behind it.

A reader that is too slow is cut off, and a broker can be restarted: --follow then
connects again by itself and goes on behind the last event that it printed, so
that none is missing and none comes twice. What was put into an archive before it
was read is said on stderr, and in a line "ledger.gap".`,
		Example: `  spectrum-cap events --follow -o json
  spectrum-cap events --after 1200 --follow --type grant.`,
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			q, err := flags.read(a)
			if err != nil {
				return err
			}
			if follow.on {
				a.eventHead()
				return a.follow(cmd.Context(), q, follow)
			}
			return a.readAudit(cmd.Context(), q, 0, followFlags{})
		},
	}
	flags.register(cmd, a)
	follow.register(cmd)
	return cmd
}

// Waits between attempts to reach a broker that is gone.
const (
	firstWait = 100 * time.Millisecond
	longWait  = 5 * time.Second
)

// follow prints events until it is interrupted. When the stream breaks it goes on
// behind the last event that it printed.
func (a *app) follow(ctx context.Context, q api.EventQuery, f followFlags) error {
	var gone time.Time // since when the broker is; zero: it is there
	wait := firstWait
	for first := true; ; first = false {
		before := q.After
		err := a.followOnce(ctx, &q, func() {
			if !gone.IsZero() {
				a.note("the broker is back; going on after event %d", q.After)
				gone, wait = time.Time{}, firstWait
			}
		})
		switch said := (*api.Error)(nil); {
		case ctx.Err() != nil:
			return nil // an interrupt is how following ends
		case errors.As(err, &said) && (first || said.Code != api.CodeUnavailable):
			return err
		case first && neverConnected(err):
			return err
		case errors.Is(err, errLocal):
			return err
		}
		if gone.IsZero() || q.After > before {
			gone, wait = a.now(), firstWait
		}
		if f.patience >= 0 && a.now().Sub(gone) >= f.patience {
			return fmt.Errorf("%w (go on with --after %d)", err, q.After)
		}
		if wait == firstWait {
			a.note("%v; connecting again, to go on after event %d", err, q.After)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = min(2*wait, longWait)
	}
}

// errLocal: not the broker's doing.
var errLocal = errors.New("cannot go on")

// followOnce prints the events of one connection. connected is called when there
// is one.
func (a *app) followOnce(ctx context.Context, q *api.EventQuery, connected func()) error {
	for e, err := range a.broker().Follow(ctx, *q, connected) {
		if err != nil {
			return err
		}
		if e.Type == api.GapType {
			a.note("skipped: %s", gapReason(e))
		}
		if err := a.printEvent(ctx, e); err != nil {
			return fmt.Errorf("%w: %w", errLocal, err)
		}
		q.After = e.Seq
	}
	return fmt.Errorf("%w: the broker ended the stream", api.ErrUnreachable)
}

// gapReason says which events are not there, and where they are.
func gapReason(e api.Event) string {
	var g api.Gap
	if err := json.Unmarshal(e.Data, &g); err != nil || g.Reason == "" {
		return fmt.Sprintf("events up to %d", e.Seq)
	}
	return g.Reason
}

// neverConnected tells that nobody listened.
func neverConnected(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "dial"
}
