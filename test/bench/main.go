// Command bench measures what the design bounds, as ratios against a probe in
// the same run, and writes the rows to a JSON file. Machines are noisy: each
// figure is the best of several interleaved rounds, of the thing and its probe.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"

	"spectrum-os.org/broker/policy"
	"spectrum-os.org/broker/test/harness"
)

// Row is one figure beside what it must be.
type Row struct {
	What string `json:"what"`
	// Value is in Unit; Probe is what it is compared with, in the same unit.
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
	Probe float64 `json:"probe,omitempty"`
	Of    string  `json:"probe_is,omitempty"`
	// Figure is what Target bounds: the ratio of value and probe, their
	// difference, or the value.
	Figure float64 `json:"figure"`
	Bound  string  `json:"bound"`
	Target float64 `json:"target,omitempty"`
	Met    *bool   `json:"met,omitempty"` // absent where nothing bounds it
}

// bench is one run.
type bench struct {
	ctx    context.Context //nolint:containedctx // the program's one
	tools  harness.Tools
	policy string
	big    int
	// brokerMost is the most tokens that a whole broker is started with.
	brokerMost int
	only       *regexp.Regexp
	rows       []Row
}

func main() {
	if len(os.Args) == 2 && os.Args[1] == "policy-worker" {
		os.Exit(policy.WorkerMain())
	}
	if len(os.Args) == 3 && os.Args[1] == "open-ledger" {
		os.Exit(openLedgerMain(os.Args[2]))
	}
	b := &bench{}
	b.tools.Register(flag.CommandLine)
	out := flag.String("json", "", "file to write the rows to")
	flag.StringVar(&b.policy, "policy-test", "", "the test binary of package policy, which measures inside a worker")
	only := flag.String("run", "", "measure only the parts whose names match this pattern")
	flag.IntVar(&b.big, "tokens", 1_000_000, "grants in the ledger that a restart loads")
	pictures := flag.String("plots", "", "measure how it grows instead, and draw it into this directory")
	document := flag.String("document", "", "with -plots, the Markdown file to write the table into")
	flag.IntVar(&b.brokerMost, "broker-tokens", 1_000_000, "with -plots, the most tokens to start a whole broker with; beyond them only its parts are measured")
	scale := flag.String("scale", "1000,10000,100000,1000000", "with -plots, the numbers of tokens to measure at")
	flag.Parse()
	// No timeout is measured here, and a busy machine must not end a run.
	b.tools.Stretch *= 10
	var err error
	if b.only, err = regexp.Compile(*only); err != nil {
		fmt.Fprintln(os.Stderr, "bench: -run:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	b.ctx = ctx
	if *pictures != "" {
		if err := b.plots(*scale, *pictures, *document); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	err = b.run()
	b.print()
	if *out != "" {
		raw, jsonErr := json.MarshalIndent(b.rows, "", "  ")
		err = errors.Join(err, jsonErr, os.WriteFile(*out, append(raw, '\n'), 0o644))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func (b *bench) run() error {
	for _, part := range []struct {
		name string
		run  func() error
	}{
		{"tokens", b.tokens},
		{"decisions", b.decisions},
		{"the ledger", b.ledger},
		{"a grant over the socket", b.overTheSocket},
		{"a large ledger", b.largeLedger},
		{"a grant on a real guest", b.onAGuest},
	} {
		if b.ctx.Err() != nil {
			return b.ctx.Err()
		}
		if !b.only.MatchString(part.name) {
			continue
		}
		fmt.Fprintf(os.Stderr, "bench: %s …\n", part.name)
		if err := part.run(); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	return nil
}

// plots measures how it grows, and tells it in pictures and a table.
func (b *bench) plots(scale, dir, document string) error {
	var tokens []int
	for text := range strings.SplitSeq(scale, ",") {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1000 {
			return fmt.Errorf("-scale: %q is not a number from 1000", text)
		}
		tokens = append(tokens, n)
	}
	s, err := b.scale(tokens)
	if err != nil {
		return err
	}
	if err := s.draw(dir); err != nil {
		return err
	}
	if document == "" {
		fmt.Print(s.table())
		return nil
	}
	return s.intoDocument(document)
}

// How a row's figure follows from its value and probe.
const (
	ratio      = "× the probe, at most"
	atLeast    = "× the probe, at least"
	difference = "more than the probe, at most"
	absolute   = "at most"
	told       = "told only"
)

func (b *bench) add(r Row) {
	switch r.Bound {
	case ratio, atLeast:
		r.Figure = r.Value / r.Probe
	case difference:
		r.Figure = r.Value - r.Probe
	case absolute, told:
		r.Figure = r.Value
	}
	if r.Bound != told {
		met := r.Figure <= r.Target
		if r.Bound == atLeast {
			met = r.Figure >= r.Target
		}
		r.Met = &met
	}
	b.rows = append(b.rows, r)
}

func (b *bench) print() {
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "WHAT\tVALUE\tPROBE\tFIGURE\tTARGET\tMET")
	for _, r := range b.rows {
		probe := "-"
		if r.Of != "" {
			probe = fmt.Sprintf("%s (%s)", amount(r.Probe, r.Unit), r.Of)
		}
		unit := r.Unit
		if r.Bound == ratio || r.Bound == atLeast {
			unit = "×"
		}
		target, met := "≤ "+amount(r.Target, unit), "yes"
		if r.Bound == atLeast {
			target = "≥ " + amount(r.Target, unit)
		}
		if r.Met == nil {
			target, met = "-", "-"
		} else if !*r.Met {
			met = "NO"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", r.What, amount(r.Value, r.Unit), probe, amount(r.Figure, unit), target, met)
	}
	_ = w.Flush()
}

func amount(v float64, unit string) string { return fmt.Sprintf("%.3g %s", v, unit) }
