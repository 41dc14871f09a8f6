package cli

import (
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/policy"
)

func (a *app) policyCommand() *cobra.Command {
	cmd := group(&cobra.Command{
		Use:   "policy",
		Short: "Check and test policies, and see which are in force",
		Example: `  spectrum-cap policy check ./policy
  spectrum-cap policy test ./policy
  spectrum-cap policy reload`,
	})
	cmd.AddCommand(a.policyCheckCommand(), a.policyTestCommand(), a.policyReloadCommand(), a.policyStatusCommand())
	return cmd
}

// findings is the answer of "policy check".
type findings struct {
	Findings []policy.Finding `json:"findings"`
}

func (a *app) policyCheckCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check DIR...",
		Short: "Check policies without loading them",
		Long: `Check the policies in directories without loading them, and without a broker:
syntax, types against the input, forbidden built-ins, the shape of the rules,
and rules that cannot be indexed. One run reports all that it can find: a file
that does not parse hides nothing in the others. It fails if there is an error;
a warning alone is none. Policies are compiled in a sandbox, as the broker does
it.`,
		Example: `  spectrum-cap policy check ./policy
  spectrum-cap policy check /etc/spectrum-broker/policy -o json`,
		Args:              args(1, -1, "a directory"),
		ValidArgsFunction: completeDirectory,
		RunE: func(cmd *cobra.Command, dirs []string) error {
			opts, err := policyWorker()
			if err != nil {
				return err
			}
			all := findings{Findings: []policy.Finding{}}
			for _, dir := range dirs {
				end := a.progress("checking %s", dir)
				found, err := policy.Check(cmd.Context(), opts, dir)
				end()
				if err != nil {
					return err
				}
				all.Findings = append(all.Findings, found...)
			}
			err = a.print(all, func(w io.Writer) { writeFindings(w, all.Findings) })
			if err != nil {
				return err
			}
			bad := 0
			for _, f := range all.Findings {
				if f.Severity != policy.SeverityWarning {
					bad++
				}
			}
			if bad > 0 {
				return &codedError{exitFailed, fmt.Sprintf("%d of %d findings would keep the policy from being loaded", bad, len(all.Findings))}
			}
			return nil
		},
	}
}

func completeDirectory(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveFilterDirs
}

// policyWorker has policies compiled and evaluated as the broker has it done:
// in a sandboxed process of this program.
func policyWorker() (policy.Options, error) {
	self, err := os.Executable()
	if err != nil {
		return policy.Options{}, fmt.Errorf("cannot find this program to run the compiler in: %w", err)
	}
	return policy.Options{Worker: []string{self, "policy-worker"}}, nil
}

func writeFindings(w io.Writer, findings []policy.Finding) {
	for _, f := range findings {
		_, _ = fmt.Fprintln(w, plain(f.String()))
	}
}

func (a *app) policyTestCommand() *cobra.Command {
	var verbose bool
	var run string
	cmd := &cobra.Command{
		Use:   "test DIR...",
		Short: "Run the tests of policies",
		Long: `Run the tests of the policies in directories, without a broker: every rule whose
name begins with test_, in files named *_test.rego of package
spectrum.grant_test. A test passes if its rule is true. One that begins with
todo_test_ is skipped.

Tests run as decisions do: in a sandbox, with the shipped library, the policy's
own data, the same built-ins, and errors of built-ins as failures. A test may
take one second.

Shown are the tests that failed, each with its file and line, with what did not
hold, and with what it printed. The exit code is 0 if all passed, and 1 if one
failed, if a policy does not compile, or if there is no test to run.`,
		Example: `  spectrum-cap policy test ./policy
  spectrum-cap policy test ./policy -v --run 'test_(write|read)_'
  spectrum-cap policy test /etc/spectrum-broker/policy -o json`,
		Args:              args(1, -1, "a directory"),
		ValidArgsFunction: completeDirectory,
		RunE: func(cmd *cobra.Command, dirs []string) error {
			if _, err := regexp.Compile(run); err != nil {
				return usage("--run %s: %w", run, err)
			}
			opts, err := policyWorker()
			if err != nil {
				return err
			}
			all := policy.TestReport{Results: []policy.TestResult{}, Findings: []policy.Finding{}}
			var without []string
			for _, dir := range dirs {
				end := a.progress("testing %s", dir)
				report, err := policy.Test(cmd.Context(), opts, dir, run)
				end()
				if err != nil {
					return err
				}
				if len(report.Results)+len(report.Findings) == 0 {
					without = append(without, dir)
				}
				all.Results = append(all.Results, report.Results...)
				all.Findings = append(all.Findings, report.Findings...)
			}
			if err := a.print(all, func(w io.Writer) { writeTests(w, all, verbose) }); err != nil {
				return err
			}
			return testsFailed(all, without, run)
		},
	}
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "show also the tests that passed")
	cmd.Flags().StringVar(&run, "run", "", "run only tests whose name, data.PACKAGE.RULE, the regular expression `regex` matches")
	_ = cmd.RegisterFlagCompletionFunc("run", cobra.NoFileCompletions)
	return cmd
}

func writeTests(w io.Writer, report policy.TestReport, verbose bool) {
	writeFindings(w, report.Findings)
	indented := func(text string) {
		for line := range strings.Lines(text) {
			_, _ = fmt.Fprintln(w, "    "+plain(strings.TrimSuffix(line, "\n")))
		}
	}
	passed, skipped := 0, 0
	for _, t := range report.Results {
		switch t.Outcome {
		case policy.TestPassed:
			passed++
		case policy.TestSkipped:
			skipped++
		}
		if !t.Failed() && !verbose {
			continue
		}
		_, _ = fmt.Fprintln(w, plain(fmt.Sprintf("%s:%d: %s: %s", t.File, t.Line, t.Name, t.Outcome)))
		if t.DetailFile != "" {
			t.Detail = fmt.Sprintf("%s:%d: %s", t.DetailFile, t.DetailLine, t.Detail)
		}
		indented(t.Detail)
		indented(t.Output)
	}
	if len(report.Results) == 0 {
		return
	}
	summary := fmt.Sprintf("%d of %d tests passed", passed, len(report.Results))
	if skipped > 0 {
		summary += fmt.Sprintf(", %d skipped", skipped)
	}
	_, _ = fmt.Fprintln(w, summary)
}

// testsFailed is why the command does not succeed, or nil.
func testsFailed(report policy.TestReport, without []string, run string) error {
	failed := 0
	for _, t := range report.Results {
		if t.Failed() {
			failed++
		}
	}
	switch {
	case len(report.Findings) > 0:
		return &codedError{exitFailed, "not every policy could be tested: what is wrong with it is shown"}
	case failed > 0:
		return &codedError{exitFailed, fmt.Sprintf("%d of %d tests failed", failed, len(report.Results))}
	case run != "" && len(report.Results) == 0:
		return &codedError{exitFailed, fmt.Sprintf("no test in %s has a name that matches %s", strings.Join(without, ", "), run)}
	case run == "" && len(without) > 0:
		return &codedError{exitFailed, fmt.Sprintf("no tests in %s: a test is a rule test_… in a file *_test.rego", strings.Join(without, ", "))}
	}
	return nil
}

func (a *app) policyReloadCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "reload",
		Short: "Have the broker read all policies again",
		Long: `Have the broker read all policies again. One that does not load leaves the last
good one of its partition in force, and the command fails.

What is granted already stays granted, even if the new policy would refuse it:
"spectrum-cap list" shows it, and "spectrum-cap revoke" ends it.`,
		Example: `  spectrum-cap policy reload
  spectrum-cap policy reload && spectrum-cap revoke --resource fs:ro:work:/`,
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			end := a.progress("loading policies")
			st, err := a.broker().ReloadPolicy(cmd.Context())
			end()
			if err != nil {
				return err
			}
			if err := a.printPolicy(st); err != nil {
				return err
			}
			for _, e := range st.Engines {
				if e.Error != "" {
					return &codedError{exitFailed, "not every policy was loaded"}
				}
			}
			return nil
		},
	}
}

func (a *app) policyStatusCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show which policies are in force",
		Example: `  spectrum-cap policy status
  spectrum-cap policy status -o json`,
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := a.broker().PolicyStatus(cmd.Context())
			if err != nil {
				return err
			}
			return a.printPolicy(st)
		},
	}
}

// shownRevision is how much of a revision tables show.
const shownRevision = 12

func (a *app) printPolicy(st api.PolicyStatus) error {
	return a.print(st, func(w io.Writer) {
		t := table{head: []string{"POLICY OF", "STATE", "REVISION", "FILES", "LOADED", "DECISIONS", "FAILURES"}, paint: a.stateColumn(1)}
		for _, e := range st.Engines {
			loaded, files, revision := "", "", e.Revision
			if len(e.Files) > 0 {
				files = strconv.Itoa(len(e.Files))
			}
			if e.LoadedAt != nil {
				loaded = stamp(*e.LoadedAt)
			}
			if !a.full && len(revision) > shownRevision {
				revision = revision[:shownRevision]
			}
			t.add(orElse(e.Name, e.Engine), e.State, revision, files, loaded,
				strconv.FormatUint(e.Decisions, 10), strconv.FormatUint(e.Failures, 10))
		}
		t.write(w)
		for _, e := range st.Engines {
			for line := range strings.SplitSeq(strings.TrimSpace(e.Error), "\n") {
				if line != "" {
					_, _ = fmt.Fprintln(w, plain(orElse(e.Name, e.Engine)+": "+line))
				}
			}
		}
	})
}
