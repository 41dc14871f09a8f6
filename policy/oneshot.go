package policy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Check reports what is wrong with the policy in dir, sorted. It runs in a
// sandboxed worker of its own, started by opts.Worker. A policy that takes the
// worker down is itself a finding; the error is for what kept it from being
// read or asked.
func Check(ctx context.Context, opts Options, dir string) ([]Finding, error) {
	src, err := ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var findings []Finding
	if err := oneShot(ctx, opts, opCheck, src, &findings); err != nil {
		if f, ok := fault(err, dir); ok {
			return []Finding{f}, nil
		}
		return nil, err
	}
	return findings, nil
}

// Test runs the policy's own tests (rules test_… of *_test.rego), in a
// sandboxed worker like Check: those whose name, data.package.rule, the regular
// expression run matches, or all if it is empty.
func Test(ctx context.Context, opts Options, dir, run string) (TestReport, error) {
	src, err := ReadDir(dir)
	if err != nil {
		return TestReport{}, err
	}
	var report TestReport
	if err := oneShot(ctx, opts, opTest, testRequest{src, run}, &report); err != nil {
		if f, ok := fault(err, dir); ok {
			return TestReport{Findings: []Finding{f}}, nil
		}
		return TestReport{}, err
	}
	return report, nil
}

func oneShot(ctx context.Context, opts Options, kind op, request, reply any) error {
	opts = opts.withDefaults()
	s := newSpawner()
	defer s.close()
	deadline := time.Now().Add(opts.LoadTimeout)
	p, err := startProcess(s, opts.Worker, opts.memory(), deadline)
	if err != nil {
		return err
	}
	defer p.close()
	stop := p.untilCancelled(ctx)
	defer stop()
	if err := p.call(kind, request, reply, deadline); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return err
	}
	return nil
}

// fault is the finding that a policy is which its worker did not survive.
func fault(err error, dir string) (Finding, bool) {
	f := Finding{File: dir, Severity: SeverityError}
	var ended *workerEnded
	switch {
	case errors.Is(err, errTimeout):
		f.Message = "the policy takes longer than is allowed"
	case errors.As(err, &ended):
		f.Message = "the policy ended its worker: it " + ended.how
	default:
		return Finding{}, false
	}
	return f, true
}

// ReadDir reads a policy from a directory: its *.rego files and data.json,
// data.yaml or data.yml, of which it may have one. Sub-directories are not
// read, symlinks not followed, sizes bounded.
func ReadDir(dir string) (Sources, error) {
	src := Sources{Files: map[string][]byte{}, Dir: dir}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return Sources{}, fmt.Errorf("cannot read the policy: %w", err)
	}
	defer func() { _ = root.Close() }()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return Sources{}, fmt.Errorf("cannot read the policy: %w", err)
	}
	for _, entry := range entries {
		name := entry.Name()
		isData := name == "data.json" || name == "data.yaml" || name == "data.yml"
		if !isData && !strings.HasSuffix(name, ".rego") {
			continue
		}
		path := filepath.Join(dir, name)
		if !entry.Type().IsRegular() {
			return Sources{}, fmt.Errorf("cannot read the policy: %s is not a plain file", path)
		}
		if isData && src.DataName != "" {
			return Sources{}, fmt.Errorf("cannot read the policy: both %s and %s in %s", src.DataName, name, dir)
		}
		text, err := readBounded(root, name)
		if err != nil {
			return Sources{}, fmt.Errorf("cannot read the policy: %s: %w", path, err)
		}
		if isData {
			src.Data, src.DataName = text, name
		} else {
			src.Files[name] = text
		}
	}
	if err := src.bounded(); err != nil {
		return Sources{}, fmt.Errorf("cannot read the policy in %s: %w", dir, err)
	}
	if len(src.Files) == 0 {
		return Sources{}, fmt.Errorf("cannot read the policy: no .rego file in %s", dir)
	}
	return src, nil
}

func readBounded(root *os.Root, name string) ([]byte, error) {
	f, err := root.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(io.LimitReader(f, maxSourceBytes+1))
	if err == nil && len(text) > maxSourceBytes {
		err = fmt.Errorf("longer than %d bytes", maxSourceBytes)
	}
	return text, err
}
