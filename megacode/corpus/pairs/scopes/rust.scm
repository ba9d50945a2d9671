[(function_item) (closure_expression)] @function
[
  (block) (if_expression) (while_expression) (for_expression) (match_arm)
] @block
[(impl_item) (trait_item)] @class
(for_expression value: (_) @outer)

[(identifier) (shorthand_field_identifier)] @word
(type_identifier) @typeword
(shorthand_field_identifier) @shorthand
(shorthand_field_initializer (identifier) @shorthand)

(function_item name: (identifier) @name)
(function_item name: (identifier) @method parameters: (parameters (self_parameter)))
(type_parameter name: (type_identifier) @type)
(const_parameter name: (identifier) @type)
(struct_item name: (type_identifier) @type)
(enum_item name: (type_identifier) @type)
(type_item name: (type_identifier) @type)
(const_item name: (identifier) @var)
(static_item name: (identifier) @var)

(let_declaration pattern: (_) @late)
(let_condition pattern: (_) @late)
(let_declaration pattern: (identifier) @pattern)
(let_condition pattern: (identifier) @pattern)
(for_expression pattern: (identifier) @pattern)
(parameter pattern: (identifier) @pattern)
(closure_parameters (identifier) @pattern)
(match_pattern . (identifier) @pattern)
(tuple_pattern (identifier) @pattern)
(tuple_struct_pattern (identifier) @pattern)
(slice_pattern (identifier) @pattern)
(captured_pattern . (identifier) @pattern)
(ref_pattern (identifier) @pattern)
(mut_pattern (identifier) @pattern)
(reference_pattern (identifier) @pattern)
(or_pattern (identifier) @pattern)
(field_pattern pattern: (identifier) @pattern)
(field_pattern name: (shorthand_field_identifier) @pattern)

(tuple_struct_pattern type: (identifier) @use)
(field_pattern [(mutable_specifier) "ref"] name: (shorthand_field_identifier) @fixed)
(scoped_identifier name: (identifier) @keep)
(scoped_type_identifier name: (type_identifier) @keep)
(lifetime (identifier) @keep)
(label (identifier) @label)
(enum_variant name: (identifier) @keep)
(macro_invocation macro: (identifier) @keep)
(attribute_item) @frozen
(use_declaration) @frozen
(macro_definition) @frozen
(static_item (mutable_specifier) name: (identifier) @fixed)
(token_tree [(string_literal) (raw_string_literal)] @format)
(token_tree "." . (identifier) @keep)
(token_tree "::" . (identifier) @keep)
(token_tree (identifier) @fixed . ["=" ":" "!"])
(token_tree "{" (identifier) @fixed)
