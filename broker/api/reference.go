package api

import (
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Reference renders an OpenAPI document as a Markdown page, in the document's
// order. The documents are part of the program, so one that cannot be
// rendered is a bug, and Reference panics.
func Reference(d Document) string {
	var root yaml.Node
	if err := yaml.Unmarshal(d.YAML(), &root); err != nil || len(root.Content) != 1 {
		panic(fmt.Sprintf("api: the document %q is broken: %v", d, err))
	}
	p := page{doc: root.Content[0]}
	p.render()
	return strings.TrimRight(p.String(), "\n") + "\n"
}

type page struct {
	strings.Builder
	doc *yaml.Node
}

func (p *page) line(format string, args ...any) { fmt.Fprintf(p, format+"\n", args...) }

func (p *page) render() {
	info := at(p.doc, "info")
	p.line("# %s\n", text(info, "title"))
	p.line("Version %s. OpenAPI: [`broker/api/openapi`](../../broker/api/openapi).\n", text(info, "version"))
	p.line("%s\n", strings.TrimSpace(text(info, "description")))
	p.line("| Method | Path | What it does | Access |\n|---|---|---|---|")
	p.operations(func(method, path string, op *yaml.Node) {
		p.line("| %s | [`%s`](#route-%s) | %s | %s |", method, path, strings.ToLower(text(op, "operationId")), cell(text(op, "summary")), text(op, "x-access-rule"))
	})
	p.line("\nAccess: `anyone` who can open the socket; a `person`, known by peer credentials; `person-recorded`, a person whose uid and pid go into policy and audit; the `holder`, a VM known by its socket, for what it holds itself.\n")
	p.line("## Routes\n")
	p.operations(p.operation)
	p.line("## Types\n")
	for name, schema := range pairs(at(p.doc, "components", "schemas")) {
		p.schema(name, schema)
	}
}

func (p *page) operations(f func(method, path string, op *yaml.Node)) {
	for path, item := range pairs(at(p.doc, "paths")) {
		for method, op := range pairs(item) {
			f(strings.ToUpper(method), path, op)
		}
	}
}

func (p *page) operation(method, path string, op *yaml.Node) {
	p.line("### Route %s\n", text(op, "operationId"))
	p.line("`%s %s`\n", method, path)
	p.line("%s. %s\n", text(op, "summary"), text(op, "description"))
	if params := at(op, "parameters"); params != nil {
		p.line("| Parameter | In | Type | Meaning |\n|---|---|---|---|")
		for _, param := range params.Content {
			param = p.resolve(param)
			need := ""
			if text(param, "required") == "true" {
				need = ", required"
			}
			p.line("| `%s` | %s%s | %s | %s |", text(param, "name"), text(param, "in"), need, p.typeOf(at(param, "schema")), cell(text(param, "description")))
		}
		p.line("")
	}
	if body := at(op, "requestBody"); body != nil {
		need := "Optional body"
		if text(body, "required") == "true" {
			need = "Body"
		}
		p.line("%s: %s\n", need, p.content(body))
	}
	for status, resp := range pairs(at(op, "responses")) {
		resp = p.resolve(resp)
		p.line("- %s: %s %s", status, text(resp, "description"), p.content(resp))
	}
	p.line("")
}

// content names the media types of a body and what they hold.
func (p *page) content(n *yaml.Node) string {
	var out []string
	for media, m := range pairs(at(n, "content")) {
		out = append(out, fmt.Sprintf("%s (`%s`)", p.typeOf(at(m, "schema")), media))
	}
	return strings.Join(out, ", ")
}

func (p *page) schema(name string, s *yaml.Node) {
	p.line("### %s\n", name)
	if d := text(s, "description"); d != "" {
		p.line("%s\n", d)
	}
	props := at(s, "properties")
	if props == nil {
		p.line("%s\n", p.typeOf(s))
		return
	}
	var required []string
	if r := at(s, "required"); r != nil {
		for _, v := range r.Content {
			required = append(required, v.Value)
		}
	}
	p.line("| Field | Type | | Meaning |\n|---|---|---|---|")
	for field, f := range pairs(props) {
		need := ""
		if slices.Contains(required, field) {
			need = "required"
		}
		p.line("| `%s` | %s | %s | %s |", field, p.typeOf(f), need, cell(text(f, "description")))
	}
	p.line("")
}

// typeOf spells a schema in a few words.
func (p *page) typeOf(s *yaml.Node) string {
	if ref := text(s, "$ref"); ref != "" {
		name := ref[strings.LastIndexByte(ref, '/')+1:]
		return fmt.Sprintf("[%s](#%s)", name, strings.ToLower(name))
	}
	if all := at(s, "allOf"); all != nil {
		return p.typeOf(all.Content[0])
	}
	if enum := at(s, "enum"); enum != nil {
		var values []string
		for _, v := range enum.Content {
			values = append(values, "`"+v.Value+"`")
		}
		return strings.Join(values, " ")
	}
	t := text(s, "type")
	switch t {
	case "array":
		t = "list of " + p.typeOf(at(s, "items"))
	case "object":
		if more := at(s, "additionalProperties"); more != nil && more.Kind == yaml.MappingNode {
			t = "map to " + p.typeOf(more)
		}
	}
	if f := text(s, "format"); f != "" && f != "int64" {
		t += " (" + f + ")"
	}
	for _, bound := range []string{"minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"} {
		if v := text(s, bound); v != "" {
			t += ", " + bound + " " + v
		}
	}
	if v := text(s, "pattern"); v != "" {
		t += ", `" + strings.ReplaceAll(v, "|", `\|`) + "`"
	}
	return t
}

// resolve follows a reference into the document.
func (p *page) resolve(n *yaml.Node) *yaml.Node {
	ref := text(n, "$ref")
	if ref == "" {
		return n
	}
	return at(p.doc, strings.Split(strings.TrimPrefix(ref, "#/"), "/")...)
}

// at walks mapping keys; nil when there is no such value.
func at(n *yaml.Node, keys ...string) *yaml.Node {
	for _, key := range keys {
		var next *yaml.Node
		for k, v := range pairs(n) {
			if k == key {
				next = v
			}
		}
		n = next
	}
	return n
}

// text returns the scalar under a key, or "".
func text(n *yaml.Node, key string) string {
	if v := at(n, key); v != nil && v.Kind == yaml.ScalarNode {
		return v.Value
	}
	return ""
}

// pairs ranges over a mapping in the document's order.
func pairs(n *yaml.Node) func(yield func(string, *yaml.Node) bool) {
	return func(yield func(string, *yaml.Node) bool) {
		if n == nil || n.Kind != yaml.MappingNode {
			return
		}
		for i := 0; i+1 < len(n.Content); i += 2 {
			if !yield(n.Content[i].Value, n.Content[i+1]) {
				return
			}
		}
	}
}

// cell makes a text fit a table.
func cell(s string) string {
	return strings.ReplaceAll(strings.Join(strings.Fields(s), " "), "|", `\|`)
}
