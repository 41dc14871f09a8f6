package cli

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/policy"
)

func (a *app) policyCommand() *cobra.Command {
	cmd := group(&cobra.Command{
		Use:   "policy",
		Short: "Check policies, and see which are in force",
		Example: `  spectrum-cap policy check ./policy
  spectrum-cap policy reload`,
	})
	cmd.AddCommand(a.policyCheckCommand(), a.policyReloadCommand(), a.policyStatusCommand())
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
		Args: args(1, -1, "a directory"),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
		RunE: func(cmd *cobra.Command, dirs []string) error {
			self, err := os.Executable()
			if err != nil {
				return fmt.Errorf("cannot find this program to run the compiler in: %w", err)
			}
			all := findings{Findings: []policy.Finding{}}
			for _, dir := range dirs {
				end := a.progress("checking %s", dir)
				found, err := policy.Check(cmd.Context(), policy.Options{Worker: []string{self, "policy-worker"}}, dir)
				end()
				if err != nil {
					return err
				}
				all.Findings = append(all.Findings, found...)
			}
			err = a.print(all, func(w io.Writer) {
				for _, f := range all.Findings {
					_, _ = fmt.Fprintln(w, plain(f.String()))
				}
			})
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

func (a *app) policyReloadCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "reload",
		Short: "Have the broker read all policies again",
		Long: `Have the broker read all policies again. One that does not load leaves the last
good one of its partition in force, and the command fails.`,
		Example: `  spectrum-cap policy reload`,
		Args:    args(0, 0, ""),
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
			if !a.full && len(revision) > 12 {
				revision = revision[:12]
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
